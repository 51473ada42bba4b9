"""``ltpctl validate nodes`` against real sshd: verdicts, files, the ledger, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from probes.report import SCHEMA_FILE
from tests.integration.conftest import LTPCTL, Run
from tests.sshd import Sshd, StartSshd, free_port

pytestmark = pytest.mark.sshd

DECLARED = """
schema: ltpctl/checks/1
family: site
checks:
  site.marker:
    what: A file that this test controls.
    why: It shows that a file of checks reaches the nodes.
    fix: Write 1 into it.
    level: quick
    file: {path}
    parse: {{kind: number}}
    metrics:
      value: {{what: the number in the file, limit: {{fail: "== 1"}}}}
  site.sleeper:
    what: A command that does not end.
    why: It shows that nothing is left running.
    fix: None.
    level: comprehensive
    timeout: 60
    command: [sleep, "{sleep}"]
    parse: {{kind: exit_status}}
    metrics:
      status: {{what: exit status, limit: {{fail: "== 0"}}}}
"""


ALL_BUT_SITE = "accelerator,bmc,host,network,storage"


class Site:
    """A fleet on real sshd with a check of its own, and the files that point at it."""

    def __init__(self, folder: Path, sshd: Sshd, count: int) -> None:
        self.marker = folder / "marker"
        self.marker.write_text("1\n")
        self.sleep = f"3600.{os.getpid()}{id(folder) % 1000:03d}"
        (folder / "checks.yaml").write_text(DECLARED.format(path=self.marker, sleep=self.sleep))
        self.nodes: dict[str, dict[str, Any]] = {
            f"node{i:02d}": {"address": sshd.addresses[i - 1]} for i in range(1, count + 1)
        }
        self.inventory = folder / "cluster.yaml"
        self.config = folder / "config.yaml"
        self.defaults = {"port": sshd.port, "identity": str(sshd.identity)}
        self.config.write_text(
            yaml.safe_dump(
                {
                    "inventory": str(self.inventory),
                    "ssh": {"config": [], "known_hosts": [str(sshd.known_hosts)], "attempts": 1},
                    "validate": {"checks": [str(folder / "checks.yaml")]},
                }
            )
        )
        self.write()

    def write(self) -> None:
        self.inventory.write_text(
            yaml.safe_dump({"cluster": "site", "defaults": self.defaults, "nodes": self.nodes})
        )

    def sleepers(self) -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if self.sleep in (p.info["cmdline"] or [])]


@pytest.fixture
def site(tmp_path: Path, start_sshd: StartSshd) -> Site:
    return Site(tmp_path, start_sshd(addresses=4), 4)


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {node["node"]: node for node in json.loads(done.stdout)["nodes"]}


def test_healthy_nodes_exit_0_and_fold_into_one_line(site: Site, ltpctl: Run) -> None:
    done = ltpctl("validate", "nodes", "--check", "site", "--config", str(site.config))
    assert done.returncode == 0, done.stderr
    assert "node[01-04]  healthy" in done.stdout


def test_the_whole_quick_plan_answers_over_real_ssh(site: Site, ltpctl: Run) -> None:
    done = ltpctl("validate", "nodes", "--quick", "--json", "--config", str(site.config))
    document = json.loads(done.stdout)
    jsonschema.validate(document, json.loads(SCHEMA_FILE.read_text()))
    assert document["schema"] == "ltpctl/validate/1"
    assert len(document["nodes"]) == 4
    for node in document["nodes"]:
        assert set(node["checks"]) >= set(document["checks"])
        assert "unknown" not in node["checks"].values(), node["findings"]
        assert "timeout" not in node["checks"].values(), node["findings"]


def test_a_failed_limit_names_value_limit_source_and_action(site: Site, ltpctl: Run) -> None:
    site.marker.write_text("7\n")
    done = ltpctl("validate", "nodes", "--check", "site", "--json", "--config", str(site.config))
    assert done.returncode == 1
    node = verdicts(done)["node01"]
    assert node["verdict"] == "unhealthy"
    finding = node["findings"][0]
    assert (finding["check"], finding["outcome"], finding["value"], finding["limit"], finding["source"]) == (
        "site.marker",
        "fail",
        7,
        "== 1",
        "default",
    )
    assert "Write 1 into it" in finding["action"]


def test_a_node_that_cannot_be_reached_is_unknown_and_delays_nobody(site: Site, ltpctl: Run) -> None:
    site.nodes["closed"] = {"address": "127.70.9.9", "port": free_port("127.70.9.9")}
    site.nodes["pythonless"] = {"address": "127.0.0.1", "port": 1, "python": "/nonexistent/python3"}
    site.nodes["pythonless"] = {**site.nodes["node04"], "python": "/nonexistent/python3"}
    del site.nodes["node04"]
    site.write()
    done = ltpctl("validate", "nodes", "--check", "site", "--json", "--config", str(site.config))
    assert done.returncode == 1
    found = verdicts(done)
    assert {name: node["verdict"] for name, node in found.items()} == {
        "closed": "unknown",
        "node01": "healthy",
        "node02": "healthy",
        "node03": "healthy",
        "pythonless": "unknown",
    }
    assert found["closed"]["findings"][0]["check"] == "transport.connect"
    assert "/nonexistent/python3" in found["pythonless"]["findings"][0]["message"]


def test_that_no_node_is_in_a_state_is_no_mistake(site: Site, ltpctl: Run) -> None:
    common = ("--state", "cordoned", "--config", str(site.config), "--json")
    validated, listed = ltpctl("validate", "nodes", *common), ltpctl("inventory", "list", *common)
    for done in (validated, listed):
        assert done.returncode == 0
        assert json.loads(done.stdout)["nodes"] == []
        assert "4 new" in done.stderr
    wrong = ltpctl("validate", "nodes", "--state", "cordond", "--config", str(site.config))
    assert wrong.returncode == 2


def test_a_key_that_is_not_there_is_said_before_any_node_is_asked(site: Site, ltpctl: Run) -> None:
    site.nodes["node03"]["identity"] = "/nonexistent/id_ed25519"
    site.write()
    done = ltpctl("validate", "nodes", "--check", "site", "--config", str(site.config))
    assert done.returncode == 2
    assert "node03: identity: there is no key file /nonexistent/id_ed25519" in done.stderr
    assert json.loads(ltpctl("validate", "runs", "--json", "--config", str(site.config)).stdout)["runs"] == []


def test_no_node_judged_is_exit_3(site: Site, ltpctl: Run) -> None:
    site.nodes = {"closed": {"address": "127.70.9.9", "port": free_port("127.70.9.9")}}
    site.write()
    assert ltpctl("validate", "nodes", "--check", "site", "--config", str(site.config)).returncode == 3


def test_an_unknown_host_key_is_refused_until_a_person_accepts_it(
    tmp_path: Path, start_sshd: StartSshd, ltpctl: Run
) -> None:
    site = Site(tmp_path, start_sshd(addresses=1, trusted=False), 1)
    arguments = ("validate", "nodes", "--check", "site", "--json", "--config", str(site.config))
    refused = ltpctl(*arguments)
    assert refused.returncode == 3
    assert verdicts(refused)["node01"]["findings"][0]["check"] == "transport.host_key"
    assert ltpctl(*arguments, "--accept-new").returncode == 0
    assert ltpctl(*arguments).returncode == 0


def test_selection_reaches_only_the_nodes_that_it_names(site: Site, ltpctl: Run) -> None:
    done = ltpctl(
        "validate", "nodes", "--nodes", "node[01-03]", "--exclude", "node02", "--check", "site", "--json",
        "--config", str(site.config),
    )  # fmt: skip
    assert sorted(verdicts(done)) == ["node01", "node03"]


def test_apply_moves_nodes_as_their_verdicts_say_and_history_tells_why(site: Site, ltpctl: Run) -> None:
    common = ("--check", "site", "--config", str(site.config))
    partial = ltpctl("validate", "nodes", "--apply", "--json", *common)
    assert json.loads(partial.stdout)["transitions"] == []
    assert "a whole plan admits them" in partial.stderr
    done = ltpctl("validate", "nodes", "--skip", ALL_BUT_SITE, "--quick", "--apply", "--json", *common[2:])
    assert {t["to"] for t in json.loads(done.stdout)["transitions"]} == {"available"}
    site.marker.write_text("0\n")
    done = ltpctl("validate", "nodes", "--nodes", "node02", "--apply", "--json", *common)
    assert json.loads(done.stdout)["transitions"] == [
        {"node": "node02", "from": "available", "to": "cordoned"}
    ]
    history = ltpctl("inventory", "history", "node02", "--json", "--config", str(site.config)).stdout
    assert "site.marker" in history
    # Only a run in which the failed check passes brings it back.
    site.marker.write_text("1\n")
    done = ltpctl(
        "validate", "nodes", "--nodes", "node02", "--check", "host.swap", "--apply", "--json", *common[2:]
    )
    assert json.loads(done.stdout)["transitions"] == []
    done = ltpctl("validate", "nodes", "--nodes", "node02", "--apply", "--json", *common)
    assert json.loads(done.stdout)["transitions"] == [
        {"node": "node02", "from": "cordoned", "to": "available"}
    ]


def test_a_jump_host_is_a_node_of_the_inventory_that_the_selection_need_not_name(
    site: Site, ltpctl: Run
) -> None:
    site.nodes["node02"]["jump"] = "node01"
    site.write()
    done = ltpctl("validate", "nodes", "--nodes", "node02", "--check", "site", "--config", str(site.config))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_node_that_was_moved_twice_meanwhile_is_left_where_it_is(site: Site, ltpctl: Run) -> None:
    """Cordoned for the marker, let out, and cordoned again for something that this run does not look at."""
    config = ("--config", str(site.config))
    site.marker.write_text("0\n")
    ltpctl("validate", "nodes", "--nodes", "node01", "--check", "site", "--apply", *config)
    ledger = site.config.parent / "state" / "ledger.db"
    moves = site.config.parent / "moves.py"
    moves.write_text(MOVES.format(ledger=str(ledger), root=str(Path(__file__).parents[2])))
    site.marker.write_text("1\n")
    checks = site.config.parent / "checks.yaml"
    checks.write_text(checks.read_text() + MOVING.format(python=sys.executable, program=moves))
    done = ltpctl(
        "validate", "nodes", "--nodes", "node01", "--check", "site", "--skip", "site.sleeper", "--apply",
        "--json", *config,
    )  # fmt: skip
    assert verdicts(done)["node01"]["verdict"] == "healthy", done.stdout
    assert json.loads(done.stdout)["transitions"] == []


MOVES = """
import sys
sys.path.insert(0, "{root}")
from inventory.ledger import open_ledger
with open_ledger("{ledger}") as ledger:
    ledger.transition("node01", "available", "somebody", "vouched for", {{}})
    bad = [{{"check": "accelerator.ecc", "outcome": "fail"}}]
    ledger.transition("node01", "cordoned", "somebody", "ECC errors", {{"findings": bad}})
"""

MOVING = """
  site.meanwhile:
    what: Somebody else works with the ledger.
    why: Test.
    fix: None.
    level: quick
    timeout: 30
    command: [{python}, {program}]
    parse: {{kind: exit_status}}
    metrics:
      status: {{what: exit status, limit: {{fail: "== 0"}}}}
"""


ALIKE = """
schema: ltpctl/checks/1
family: site
checks:
  site.word:
    what: A word that all nodes should say.
    why: Test.
    fix: Say the same.
    level: quick
    command: [echo, "{word}"]
    parse: {kind: text}
    params: {word: usual}
    metrics:
      word: {what: the word, peers: {rule: majority, outcome: fail}}
"""


def test_a_node_that_was_unlike_its_peers_does_not_come_back_by_being_looked_at_alone(
    site: Site, ltpctl: Run
) -> None:
    (site.config.parent / "checks.yaml").write_text(ALIKE)
    site.nodes["node04"]["vars"] = {"params": {"site.word": {"word": "odd"}}}
    site.write()

    def moves(*arguments: str) -> list[dict[str, str]]:
        common = ("--check", "site", "--apply", "--json", "--config", str(site.config))
        moved = json.loads(ltpctl("validate", "nodes", *arguments, *common).stdout)["transitions"]
        return [move for move in moved if move["node"] == "node04"]

    assert moves() == [{"node": "node04", "from": "new", "to": "cordoned"}]
    assert moves("--nodes", "node04") == []
    assert moves() == []
    del site.nodes["node04"]["vars"]
    site.write()
    assert moves() == [{"node": "node04", "from": "cordoned", "to": "available"}]


def test_diff_names_what_became_worse_and_what_recovered(site: Site, ltpctl: Run) -> None:
    common = ("--config", str(site.config))
    too_early = ltpctl("validate", "diff", *common)
    assert too_early.returncode == 3
    for content in ("1", "5", "1"):
        site.marker.write_text(content)
        ltpctl("validate", "nodes", "--check", "site", *common)
        if content == "5":
            worse = ltpctl("validate", "diff", "--json", *common)
    assert worse.returncode == 1
    assert [change["node"] for change in json.loads(worse.stdout)["worse"]] == [
        "node01",
        "node02",
        "node03",
        "node04",
    ]
    recovered = ltpctl("validate", "diff", *common)
    assert recovered.returncode == 0
    assert "recovered, was unhealthy" in recovered.stdout


def test_reports_are_written_whole_and_what_a_node_says_is_not_markup(
    site: Site, ltpctl: Run, tmp_path: Path
) -> None:
    site.marker.write_text("<script>alert(1)</script>\x1b[2J\n")
    (tmp_path / "checks.yaml").write_text(
        (tmp_path / "checks.yaml")
        .read_text()
        .replace("kind: number", "kind: text")
        .replace('"== 1"', '"== good"')
    )
    html, junit = tmp_path / "report.html", tmp_path / "report.xml"
    done = ltpctl(
        "validate",
        "nodes",
        "--check",
        "site",
        "--html",
        str(html),
        "--junit",
        str(junit),
        "--config",
        str(site.config),
    )
    assert done.returncode == 1
    page = html.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", ""), "the page must not load anything"
    assert "\x1b" not in page + done.stdout + junit.read_text()
    suites = ET.parse(junit).getroot()
    assert [s.get("failures") for s in suites] == ["1"] * 4
    assert [p.name for p in tmp_path.glob(".report*")] == []


def test_a_report_that_cannot_be_written_is_said_before_any_node_is_asked(site: Site, ltpctl: Run) -> None:
    done = ltpctl("validate", "nodes", "--html", "/nonexistent/x.html", "--config", str(site.config))
    assert done.returncode == 2
    assert "/nonexistent" in done.stderr
    assert ltpctl("validate", "runs", "--json", "--config", str(site.config)).stdout.count('"id"') == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--check", "acelerator.ecc"), "did you mean accelerator.ecc"),
        (("--nodes", "node[1-5000000]"), "5000000"),
        (("--quick", "--standard"), "give one of --quick and --standard"),
        (("--apply", "--no-ledger"), "--no-ledger"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(
    site: Site, ltpctl: Run, arguments: tuple[str, ...], said: str
) -> None:
    done = ltpctl("validate", "nodes", *arguments, "--config", str(site.config))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_prints_what_is_known_and_leaves_nothing_running(
    site: Site, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = (
        "validate",
        "nodes",
        "--check",
        "site.marker,site.sleeper",
        "--json",
        "--config",
        str(site.config),
    )
    environment = {**os.environ, "LTP_STATE_DIR": str(tmp_path / "state")}
    process = subprocess.Popen([*LTPCTL, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 30
    while len(site.sleepers()) < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    document = json.loads(output)
    assert document["interrupted"]
    for node in document["nodes"]:
        assert node["verdict"] == "unknown"
        assert node["checks"]["site.marker"] == "pass"
    while site.sleepers():
        assert time.monotonic() < deadline + 10, "a command outlived its controller"
        time.sleep(0.05)


def test_a_controller_that_is_killed_leaves_nothing_running_and_the_ledger_whole(
    site: Site, tmp_path: Path, ltpctl: Run
) -> None:
    arguments = ("validate", "nodes", "--check", "site.sleeper", "--config", str(site.config))
    environment = {**os.environ, "LTP_STATE_DIR": str(tmp_path / "state")}
    process = subprocess.Popen([*LTPCTL, *arguments], stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 30
    while len(site.sleepers()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while site.sleepers():
        assert time.monotonic() < deadline + 10, "a command outlived its controller"
        time.sleep(0.05)
    listed = json.loads(ltpctl("validate", "runs", "--json", "--config", str(site.config)).stdout)["runs"]
    assert [run["finished"] for run in listed] == [None]
