"""A ledger on a real PostgreSQL, through the commands."""

from __future__ import annotations

import json

import pytest

from tests.integration.conftest import Run
from tests.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]

OTHERS = "accelerator,bmc,network,storage,host.t*,host.u*,host.s*,host.p*,host.m*,host.k*"
"""Checks that say more about the machine of the tests than about the ledger."""

pytestmark = pytest.mark.postgres


def test_a_run_is_kept_states_move_and_history_tells_it(ltpctl: Run, postgres_url: str) -> None:
    common = ("--ledger", postgres_url)
    done = ltpctl("validate", "nodes", "--quick", "--skip", OTHERS, "--apply", "--json", *common)
    assert done.returncode == 0, done.stderr
    node = json.loads(done.stdout)["nodes"][0]["node"]
    listed = json.loads(ltpctl("inventory", "list", "--json", *common).stdout)["nodes"]
    assert [(one["node"], one["state"]) for one in listed] == [(node, "available")]
    assert "available" in ltpctl("inventory", "history", node, *common).stdout
    assert len(json.loads(ltpctl("validate", "runs", "--json", *common).stdout)["runs"]) == 1
