"""What statuses and signals say, on real endings where a process can be made to end so."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recovery.diagnose import exitstatus
from recovery.diagnose.exitstatus import (
    Blame,
    Ending,
    explain,
    of_popen,
    of_shell,
    of_slurm,
    of_torchrun,
    of_wait,
)

TABLE = yaml.safe_load(Path(exitstatus.__file__).with_suffix(".yaml").read_text())


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (0, "success"),
        (1, "error"),
        (2, "usage"),
        (126, "not executable"),
        (127, "not found"),
        (129, "SIGHUP"),
        (130, "SIGINT"),
        (134, "SIGABRT"),
        (135, "SIGBUS"),
        (137, "SIGKILL"),
        (139, "SIGSEGV"),
        (143, "SIGTERM"),
        (247, "SIGKILL"),
        (245, "SIGSEGV"),
        (250, "SIGABRT"),
        (241, "SIGTERM"),
        (255, "connection or -1"),
    ],
)
def test_statuses_as_a_shell_shows_them(status: int, name: str) -> None:
    assert explain(of_shell(status)).name == name


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGINT]
)
def test_a_process_that_a_signal_really_ended_is_explained_from_popen_shell_and_wait(
    number: signal.Signals,
) -> None:
    shell = ["sh", "-c", f"kill -{int(number)} $$"]
    returncode = subprocess.run(shell, check=False).returncode
    nested = subprocess.run(["sh", "-c", f"sh -c 'kill -{int(number)} $$'; exit $?"], check=False).returncode
    for ending in (of_popen(returncode), of_shell(nested), of_wait(int(number)), of_wait(int(number) | 0x80)):
        assert (ending, explain(ending).name) == (Ending(None, int(number)), number.name)


def test_a_launcher_that_exits_with_popens_number_is_seen_through() -> None:
    program = "import subprocess, sys; sys.exit(subprocess.run(['sh', '-c', 'kill -9 $$']).returncode)"
    returncode = subprocess.run([sys.executable, "-c", program], check=False).returncode
    assert returncode == 247
    assert explain(of_popen(returncode)).name == "SIGKILL"


def test_an_uncaught_exception_is_the_users_and_a_killed_process_is_nobodys_yet() -> None:
    failed = subprocess.run([sys.executable, "-c", "1/0"], check=False, stderr=subprocess.DEVNULL)
    assert explain(of_popen(failed.returncode)).blame is Blame.USER
    assert explain(of_popen(-9)).blame is Blame.UNKNOWN
    assert "out-of-memory" in explain(of_popen(-9)).next


def test_a_number_of_the_programs_own_is_not_explained_away() -> None:
    found = explain(of_shell(42))
    assert (found.known, found.blame, found.retry) == (False, Blame.UNKNOWN, None)
    assert "42" in found.meaning
    assert not explain(of_popen(-60)).known
    assert not explain(Ending(None, None)).known


@pytest.mark.parametrize(
    ("code", "state", "name"),
    [
        ("0:0", "COMPLETED", "success"),
        ("1:0", "FAILED", "error"),
        ("0:9", "", "SIGKILL"),
        ("137:0", "FAILED", "SIGKILL"),
        ("0:125", "", "SIG_OOM"),
        ("0:125", "OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("0:15", "CANCELLED by 1000", "CANCELLED"),
        ("0:0", "NODE_FAIL", "NODE_FAIL"),
        ("0:15", "TIMEOUT", "TIMEOUT"),
        ("", "PREEMPTED", "PREEMPTED"),
        ("0:53", "", "signal 53"),
    ],
)
def test_slurms_pairs_and_states(code: str, state: str, name: str) -> None:
    ending = of_slurm(code, state)
    assert ending is not None
    assert explain(ending).name == name


def test_what_is_not_slurms_is_nothing() -> None:
    assert of_slurm("nine") is None
    assert of_slurm("9", "RUNNING") is None


def test_only_a_lost_node_leans_towards_hardware() -> None:
    leaning = {key for part in TABLE.values() for key, row in part.items() if row["blame"] == "hardware"}
    assert leaning == {"NODE_FAIL"}


def test_every_row_says_what_it_means_what_is_next_and_where_that_is_from() -> None:
    for part, rows in TABLE.items():
        for key, row in rows.items():
            assert set(row) == {"name", "meaning", "blame", "retry", "next", "source"}, (part, key)
            assert all(isinstance(row[f], str) and row[f] for f in ("name", "meaning", "next", "source")), key
            assert row["retry"] in (True, False, None)
            Blame(row["blame"])
    assert all(signal.Signals(number).name == row["name"] for number, row in TABLE["signals"].items())


@pytest.mark.torch
@pytest.mark.timeout(200)
def test_the_report_of_a_real_torchrun_names_the_first_failure(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(120)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    found = of_torchrun(done.stderr)
    assert [(f.rank, f.local_rank, f.exitcode, f.root_cause) for f in found[:1]] == [(1, 1, -9, True)]
    assert explain(found[0].ending).name == "SIGKILL"
    assert found[0].pid
    assert found[0].time
    line = next(text for text in done.stderr.splitlines() if "failed (exitcode" in text)
    assert [(f.local_rank, f.exitcode, f.root_cause) for f in of_torchrun(line)] == [(1, -9, False)]


def test_several_failures_are_listed_with_the_root_cause_first() -> None:
    # Shape of ChildFailedError's message (torch/distributed/elastic/multiprocessing/errors/__init__.py).
    text = """\
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2025-01-01_10:00:07
  host      : node001
  rank      : 3 (local_rank: 3)
  exitcode  : 1 (pid: 303)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2025-01-01_10:00:05
  host      : node001
  rank      : 2 (local_rank: 2)
  exitcode  : -11 (pid: 302)
  error_file: <N/A>
  traceback : Signal 11 (SIGSEGV) received by PID 302
============================================================
"""
    assert [(f.rank, f.exitcode, f.host, f.pid, f.root_cause) for f in of_torchrun(text)] == [
        (2, -11, "node001", 302, True),
        (3, 1, "node001", 303, False),
    ]
    assert of_torchrun("all went well") == ()
