from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.exchange.__main__ import main, run
from benchmarks.exchange.rank import Setup

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="needs root and iproute2, to make network namespaces",
)


def namespaces() -> set[str]:
    text = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in text.splitlines()}


@needs_namespaces
def test_over_a_real_link_a_token_crosses_once_a_node_and_not_once_an_expert() -> None:
    before = namespaces()
    setup = Setup(top_k=(4,), tokens=256, width=128, hidden=16, rounds=1, steps=2, rate="1gbit")
    flat, topology = run(setup, timeout=90)
    assert (flat.exchange, topology.exchange) == ("flat", "topology")
    assert namespaces() == before
    # Headers and acknowledgements come on top of the payload; nothing of it can be missing.
    assert 1.0 < flat.link_mb / flat.expected_mb < 1.15
    assert 1.0 < topology.link_mb / topology.expected_mb < 1.15
    predicted = flat.expected_mb / topology.expected_mb
    assert predicted > 1.8
    assert flat.link_mb / topology.link_mb == pytest.approx(predicted, rel=0.1)


@needs_namespaces
def test_a_link_that_cannot_be_made_is_one_line_and_leaves_nothing_behind() -> None:
    before = namespaces()
    with pytest.raises(SystemExit, match="rate"):
        run(Setup(rate="fast"))
    assert namespaces() == before


def test_a_wrong_shape_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["exchange", "--experts", "33"])
    with pytest.raises(SystemExit, match=r"^--experts 33: must be a multiple of 4 ranks"):
        main()
