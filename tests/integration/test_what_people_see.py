"""What stands on the screen when something is wrong, with the node or with ltpctl's own surroundings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import LTPCTL, Run
from tests.sshd import free_port

CHECK = """
  site.{name}:
    what: One of this test.
    why: It plays a part.
    fix: Write 1 into the file that this test controls, whose name is too long to stand in a narrow column.
    level: quick
    {source}
    metrics:
      {metric}: {{what: its value, limit: {{fail: "{limit}"}}}}
"""
NUMBER = "file: {}\n    parse: {{kind: number}}"
STATUS = "command: {}\n    parse: {{kind: exit_status}}"


def config(folder: Path, *checks: str) -> str:
    """A configuration with these checks, for this machine."""
    (folder / "checks.yaml").write_text("schema: ltpctl/checks/1\nfamily: site\nchecks:\n" + "".join(checks))
    file = folder / "config.yaml"
    file.write_text(f"validate: {{checks: [{folder / 'checks.yaml'}]}}\n")
    return str(file)


def value(name: str, file: Path | str, limit: str = "== 1") -> str:
    return CHECK.format(name=name, source=NUMBER.format(file), metric="value", limit=limit)


def test_verdicts_that_the_ledger_cannot_keep_are_shown_before_the_error(tmp_path: Path, ltpctl: Run) -> None:
    ledger = tmp_path / "state" / "ledger.db"
    command = json.dumps(["truncate", "--size", "4096", str(ledger)])
    breaks = CHECK.format(name="breaks", source=STATUS.format(command), metric="status", limit="== 0")
    asked = ("validate", "nodes", "--check", "site", "--config")
    (tmp_path / "one").write_text("1\n")
    assert ltpctl(*asked, config(tmp_path, value("one", tmp_path / "one"))).returncode == 0
    done = ltpctl(*asked, config(tmp_path, breaks))
    assert done.returncode == 2
    assert "1 healthy" in done.stdout
    assert "damaged" in done.stderr.splitlines()[-1]
    assert "compare with" not in done.stderr


ALL_BUT_SITE = "accelerator,bmc,collective,compute,host,load,network,storage"


def test_the_reason_of_a_healthy_node_names_no_check_that_does_not_count(tmp_path: Path, ltpctl: Run) -> None:
    (tmp_path / "one").write_text("1\n")
    checks = value("absent", tmp_path / "absent"), value("one", tmp_path / "one")
    document = ltpctl(
        "validate",
        "nodes",
        "--skip",
        ALL_BUT_SITE,
        "--apply",
        "--json",
        "--config",
        config(tmp_path, *checks),
    )
    node = json.loads(document.stdout)["nodes"][0]
    assert (node["verdict"], node["checks"]["site.absent"]) == ("healthy", "unsupported")
    events = json.loads(ltpctl("inventory", "history", node["node"], "--json").stdout)["events"]
    assert [event["reason"] for event in events] == ["validated healthy"]


def test_on_a_narrow_screen_the_finding_has_most_of_the_line(tmp_path: Path, ltpctl: Run) -> None:
    (tmp_path / "two").write_text("2\n")
    checks = config(tmp_path, value("two", tmp_path / "two"))
    asked = ("validate", "nodes", "--check", "site", "--config", checks)
    narrow, wide = ltpctl(*asked, COLUMNS="80"), ltpctl(*asked, COLUMNS="160")
    assert (narrow.returncode, wide.returncode) == (1, 1)
    assert "OUTCOME" in wide.stdout
    assert "OUTCOME" not in narrow.stdout
    assert "fail site.two\n" in narrow.stdout
    assert max(map(len, narrow.stdout.splitlines())) <= 80
    advice = [line.strip() for line in narrow.stdout.splitlines() if "-> Write 1 into the file" in line]
    assert len(advice[0]) > 40


def test_a_connection_that_failed_is_no_limit_of_anybody(tmp_path: Path, ltpctl: Run) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"nodes:\n  node1: {{address: 127.70.9.9, port: {free_port('127.70.9.9')}}}\n")
    done = ltpctl("validate", "nodes", "--quick", "-i", str(file), LTP_SSH_ATTEMPTS="1")
    assert done.returncode == 3
    assert "refused the connection" in done.stdout
    assert "(default)" not in done.stdout


def test_a_node_to_which_no_check_applies_says_so(tmp_path: Path, ltpctl: Run) -> None:
    file = tmp_path / "config.yaml"
    adapter = Path(__file__).parents[2] / "examples" / "adapters" / "tenstorrent.yaml"
    file.write_text(f"validate: {{checks: [{adapter}]}}\n")
    done = ltpctl("validate", "nodes", "--check", "tenstorrent", "--config", str(file))
    assert done.returncode == 3
    assert "no check of this plan applies here" in done.stdout


def test_a_defect_of_the_program_is_not_taken_for_findings() -> None:
    program = (
        "import typer\n"
        "from ltpctl import frame\n"
        "app = typer.Typer()\n"
        "@frame.command(app, 'broken', example='broken')\n"
        "def broken(session: frame.Session) -> None:\n"
        "    raise KeyError('site')\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, text=True)
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ltpctl: a defect of ltpctl itself")


def test_a_locale_without_unicode_costs_a_character_not_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "clüster.yaml"
    file.write_text("nodes: {node1: {sku: h100, accelerators: 8}}\n")
    done = subprocess.run(
        [*LTPCTL, "inventory", "check", "-i", str(file)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"cl\\xfcster.yaml: 1 node" in done.stdout


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("sku: h1000", "h1000"),
        ("vars: {limits: {storage.space.used_percnt: '< 90'}}", "used_percnt"),
        ("vars: {limits: {storage.space.used_percent: 'under 90'}}", "under 90"),
    ],
)
def test_inventory_check_tells_what_a_validation_would_refuse(
    tmp_path: Path, ltpctl: Run, said: str, word: str
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"nodes:\n  node1: {{{said}}}\n")
    done = ltpctl("inventory", "check", "-i", str(file))
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["transport.connect", "agent.leftover", "fleet.sku", "host.clock"])
def test_explain_knows_the_findings_that_no_check_makes(name: str, ltpctl: Run) -> None:
    done = ltpctl("validate", "explain", name)
    assert done.returncode == 2
    assert f"'{name}' is no check of a plan but" in done.stderr


def test_the_simulation_s_advice_is_not_led_astray_by_the_environment(tmp_path: Path) -> None:
    folder = tmp_path / "my fleet"
    with subprocess.Popen(
        [*LTPCTL, "sim", "start", "--nodes", "n[1-2]", "--dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "LTP_INVENTORY": "/nonexistent/real-cluster.yaml"},
    ) as fleet:
        assert fleet.stdout
        told = [fleet.stdout.readline() for _ in range(2)]
        advice = told[1].removeprefix("try: ")
        asked = subprocess.run(
            ["sh", "-c", advice.replace("ltpctl", f"{sys.executable} -c '{LTPCTL[2]}'", 1)],
            capture_output=True,
            check=False,
            text=True,
            env={**os.environ, "LTP_INVENTORY": "/nonexistent/real-cluster.yaml"},
        )
        fleet.terminate()
    assert told[0].startswith("2 nodes")
    assert asked.returncode == 0, asked.stderr
    assert "2 healthy" in asked.stdout
