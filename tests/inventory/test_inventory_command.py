"""``ltpctl inventory`` through the real program."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from inventory.ledger import MeasurementRow, VerdictRow, open_ledger
from inventory.sources import load
from tests.sshd import Sshd, ssh_keys, sshd

__all__ = ["ssh_keys", "sshd"]

CLUSTER = """\
cluster: lab
defaults: {user: ops, sku: h100, accelerators: 8}
groups: {rack1: "node[001-032]", spares: "node[063-064]"}
nodes:
  "node[001-064]": {address: "10.0.0.[1-64]"}
  gate: {address: gate.lab.example.com, sku: cpu, accelerators: 0}
"""


class Program:
    """The program in a folder of its own, with its own state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "state" / "ledger.db"
        (folder / "cluster.yaml").write_text(CLUSTER)

    def __call__(self, *arguments: str, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            "LTP_INVENTORY": "cluster.yaml",
            "LTP_STATE_DIR": str(self.folder / "state"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            [sys.executable, "-c", "from ltpctl.cli import main; main()", "inventory", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.folder,
            input=stdin,
            env={**os.environ, **environment},
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status).stdout)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_list_folds_equal_nodes(program: Program) -> None:
    lines = [line.split() for line in program("list").stdout.splitlines()]
    assert lines == [
        ["NODES", "COUNT", "ADDRESS", "USER", "SKU", "ACCELERATORS", "GROUPS", "STATE"],
        ["gate", "1", "gate.lab.example.com", "ops", "cpu", "0", "new"],
        ["node[001-032]", "32", "10.0.0.[1-32]", "ops", "h100", "8", "rack1", "new"],
        ["node[033-062]", "30", "10.0.0.[33-62]", "ops", "h100", "8", "new"],
        ["node[063-064]", "2", "10.0.0.[63-64]", "ops", "h100", "8", "spares", "new"],
    ]


def test_list_expands_and_selects(program: Program) -> None:
    lines = program("list", "--expand", "--nodes", "spares,gate", "--exclude", "node064").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["gate", "node063"]


def test_list_as_json_has_every_attribute(program: Program) -> None:
    told = program.json("list", "--nodes", "node001")
    assert (told["schema"], told["cluster"]) == ("ltpctl/inventory/1", "lab")
    assert told["nodes"][0]["node"] == "node001"
    assert told["nodes"][0]["address"] == "10.0.0.1"
    assert told["nodes"][0]["state"] == "new"
    assert told["nodes"][0]["origin"] == "cluster.yaml:5"


def test_without_an_inventory_this_machine_is_listed(program: Program) -> None:
    told = json.loads(program("list", "--json", "-i", "").stdout)
    assert [node["local"] for node in told["nodes"]] == [True]


def test_an_inventory_is_taken_from_standard_input(program: Program) -> None:
    assert "x[1-3]" in program("list", "-i", "-", stdin="x[1-3]\n").stdout


def test_set_state_moves_nodes_and_history_tells_it(program: Program) -> None:
    program("set-state", "spares", "held", "--reason", "memory on order")
    told = program.json("history", "node063")
    assert [(e["from"], e["to"], e["reason"]) for e in told["events"]] == [("new", "held", "memory on order")]
    assert [n["node"] for n in program.json("list", "--state", "held")["nodes"]] == ["node063", "node064"]
    assert program.json("show", "node064")["reason"] == "memory on order"
    assert "new -> held" in program("history", "node064").stdout


def test_set_state_is_all_or_nothing(program: Program) -> None:
    program("set-state", "node002", "retired", "--reason", "sold")
    done = program("set-state", "node[001-002]", "available", "--reason", "x", status=2)
    assert "nothing was changed" in done.stderr
    with open_ledger(program.ledger, read_only=True) as ledger:
        assert ledger.states(["node001"])["node001"].state == "new"


def test_set_state_says_beforehand_what_it_would_do(program: Program) -> None:
    done = program("set-state", "node[001-002]", "held", "--reason", "x", "--dry-run")
    assert done.stdout == "node[001-002]: would go from new to held\n"
    assert not program.ledger.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "gat"], "no node is called 'gat'; near it: gate"),
        (["history", "nobody"], "no node is called 'nobody'"),
        (["list", "--nodes", "rack9"], "no node or group is called 'rack9'; near it: rack1"),
        (["set-state", "node001", "hled", "--reason", "x"], "there is no node state 'hled'"),
        (["set-state", "node001", "held", "--reason", " "], "--reason: say why"),
        (["check", "-i", "missing.yaml"], "missing.yaml: cannot be read: No such file or directory"),
        (
            ["import", "cluster.yaml", "--output", "cluster.yaml"],
            "cluster.yaml exists; give another name, or --force",
        ),
        (["import", "cluster.yaml", "--output", "no/such/folder"], "no/such/folder cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(program: Program, arguments: list[str], says: str) -> None:
    done = program(*arguments, status=2)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_check_names_the_line_of_a_mistake(program: Program) -> None:
    (program.folder / "cluster.yaml").write_text(CLUSTER + "  node007: {}\n")
    done = program("check", status=2)
    assert (
        "cluster.yaml:7: nodes.node007: node007 is already declared on line 5 by 'node[001-064]'"
        in done.stderr
    )


def test_check_sums_up_and_warns(program: Program) -> None:
    (program.folder / "cluster.yaml").write_text(CLUSTER + "  bare: {sku: null}\n  n1: {identity: gone}\n")
    done = program("check")
    assert "cluster.yaml: 67 nodes, 2 groups" in done.stdout
    assert "warning: n1: the file " in done.stdout
    assert program.json("check")["nodes"] == 67


@pytest.mark.sshd
def test_check_connects_to_every_node_and_reports_each(program: Program, sshd: Sshd) -> None:
    address = sshd.addresses[0]
    (program.folder / "cluster.yaml").write_text(
        f"defaults: {{sku: cpu, accelerators: 0, identity: {sshd.identity}}}\n"
        "nodes:\n"
        f"  good: {{address: {address}, port: {sshd.port}}}\n"
        "  bad: {address: 127.0.0.1, port: 1}\n"
    )
    (program.folder / "config.yaml").write_text(f"ssh: {{known_hosts: [{sshd.known_hosts}], attempts: 1}}\n")
    told = program.json("check", "--connect", "--config", "config.yaml", status=1)
    assert [(c["node"], c["ok"]) for c in told["connections"]] == [("bad", False), ("good", True)]
    assert told["connections"][0]["phase"] == "connect"
    done = program("check", "--connect", "--config", "config.yaml", "--nodes", "good")
    assert "connected to 1 of 1 node" in done.stdout


def test_import_writes_a_file_that_is_an_equal_inventory(program: Program) -> None:
    (program.folder / "hosts.ini").write_text("[gpu]\ng[1:3] ansible_host=10.0.0.1 ltp_sku=h100\n")
    program("import", "hosts.ini", "--output", "new.yaml")
    ours, theirs = load(str(program.folder / "new.yaml")), load(str(program.folder / "hosts.ini"))
    assert [(n.name, n.address, n.sku) for n in ours.nodes.values()] == [
        (n.name, n.address, n.sku) for n in theirs.nodes.values()
    ]
    assert program("import", "hosts.ini").stdout == (program.folder / "new.yaml").read_text()


def test_import_replaces_a_file_as_a_whole_and_keeps_its_mode_and_the_link_to_it(program: Program) -> None:
    (program.folder / "hosts.ini").write_text("[gpu]\ng[1:3] ansible_host=10.0.0.1\n")
    old, link = program.folder / "old.yaml", program.folder / "link.yaml"
    old.write_text("the old inventory\n")
    old.chmod(0o640)
    link.symlink_to("old.yaml")
    with old.open() as reader:
        program("import", "hosts.ini", "--output", "link.yaml", "--force")
        # Whoever was reading it goes on reading what it was: at no moment is half a file there.
        assert reader.read() == "the old inventory\n"
    assert link.is_symlink()
    assert len(load(str(old))) == 3
    assert old.stat().st_mode & 0o777 == 0o640
    program("import", "hosts.ini", "--output", "none.yaml", "--force")
    assert (program.folder / "none.yaml").read_text() == old.read_text()


def test_prune_removes_old_runs_says_how_many_and_keeps_history_and_newest_verdicts(program: Program) -> None:
    for days in (200, 100, 1):
        when = time.time() - 86400 * days
        with open_ledger(program.ledger, clock=itertools.repeat(when).__next__) as ledger:
            run = ledger.begin_run("validate", plan="quick", actor="alice", selection="")
            verdicts = [VerdictRow(node, "healthy") for node in ("node001", "node002")]
            numbers = [MeasurementRow(row.node, "host.memory.total", float(days)) for row in verdicts]
            ledger.record_verdicts(run, verdicts, numbers)
            ledger.finish_run(run, {})
            if days == 200:
                ledger.transition("node001", "available", "alice", "validated", {})
    told = program.json("prune", "--keep-days", "150")
    assert told | {"before": ""} == {
        "schema": "ltpctl/prune/1", "before": "", "runs": 1, "verdicts": 2, "measurements": 2
    }  # fmt: skip
    assert ": 1 run, 2 verdicts, 2 measurements\n" in program("prune", "--keep-days", "90").stdout
    assert ": 0 runs, 0 verdicts, 0 measurements\n" in program("prune", "--keep-days", "90").stdout
    with open_ledger(program.ledger, read_only=True) as ledger:
        assert [event.kind for event in ledger.events()] == ["transition", *["pruned"] * 3]
        assert ledger.events()[-1].actor
        assert len(ledger.runs()) == 1
    assert program.json("show", "node001")["last_verdict"]["verdict"] == "healthy"


def test_prune_removes_nothing_unless_told_how_much_to_keep(program: Program) -> None:
    assert "--keep-days" in program("prune", status=2).stderr
    assert "--keep-days" in program("prune", "--keep-days", "0", status=2).stderr
    assert not program.ledger.exists()


def test_prune_tells_when_baselines_lose_what_they_learn_from(program: Program) -> None:
    assert "learned from 28 days" in program("prune", "--keep-days", "7").stderr
    assert program("prune", "--keep-days", "28").stderr == ""
