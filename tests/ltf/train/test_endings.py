"""How a run ends before its last step: told to, interrupted, without a peer, without a disk."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from .runs import Runs, reached

LONG = 100_000


def test_told_to_end_it_saves_and_the_next_start_goes_on_bit_for_bit(runs: Runs) -> None:
    whole = runs.warm("whole", 2, run__steps=60, checkpoint__every_steps=None)
    attempt = runs.start("run", 2, run__steps=60, checkpoint__every_steps=None)
    attempt.when(reached(7))
    # To one rank alone: the others learn of it.
    attempt.signal(signal.SIGTERM, only=1)
    told = attempt.wait()
    assert told.statuses == [143, 143]
    [saved] = told.events("checkpoint_saved")
    ended = told.events("exited")[-1]
    assert (ended["status"], ended["reason"]) == (143, "signal")
    assert saved["step"] >= 7
    again = runs.warm("run", 2, run__steps=60, checkpoint__every_steps=None)
    assert again.events("resumed")[0]["step"] == saved["step"]
    assert again.losses == whole.losses


def test_a_warning_signal_saves_and_training_goes_on(runs: Runs) -> None:
    attempt = runs.start("run", 2, run__steps=40, checkpoint__every_steps=None)
    attempt.when(reached(3))
    attempt.signal(signal.SIGUSR1)
    told = attempt.wait()
    assert told.statuses == [0, 0]
    saved = [event["step"] for event in told.events("checkpoint_saved")]
    assert len(saved) == 2
    assert 3 <= saved[0] < 40
    assert saved[1] == 40


def test_ctrl_c_ends_every_process(runs: Runs) -> None:
    attempt = runs.start("run", run__steps=LONG)
    attempt.when(reached(2))
    attempt.signal(signal.SIGINT)
    told = attempt.wait(30)
    assert told.statuses == [130]
    assert told.events("exited")[-1]["reason"] == "signal"
    assert "Traceback" not in attempt.output()


def test_a_rank_whose_peer_was_killed_ends_and_says_that_it_lost_it(runs: Runs) -> None:
    attempt = runs.start("run", 2, run__steps=LONG)
    attempt.when(reached(3))
    attempt.signal(signal.SIGKILL, only=1)
    told = attempt.wait(60)
    assert told.statuses == [1, -signal.SIGKILL]
    assert "lost the other ranks" in attempt.output()
    assert told.events("exited")[-1]["reason"] == "error"


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """4 MiB: room for one checkpoint of the model and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_a_finding_and_not_the_run(runs: Runs, small_disk: Path) -> None:
    told = runs.warm("run", checkpoint__directory=str(small_disk / "checkpoints"))
    assert "checkpoint.failed" in told.findings
    assert told.losses.keys() == set(range(1, 13))
    failure = next(e for e in told.events("finding") if e["kind"] == "checkpoint.failed")
    assert "No space left on device" in failure["message"]
