"""Real processes: killed at any instant, told to end in the middle of a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ltf.checkpoint.load import load_tensors
from ltf.checkpoint.store import Store
from tests.ltf.ranks import free_port

ROOT = Path(__file__).parents[3]
KILLS = 16


def test_whenever_it_is_killed_the_newest_committed_checkpoint_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ltf.checkpoint.killed", str(tmp_path), str(KILLS)]
    output = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True, env=_environment()
    )
    reports = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(reports) == KILLS
    before = 0
    for report in reports:
        assert report["right"], report
        assert report["findings"] == 0, report
        assert report["loaded"] >= max(report["announced"], before), report
        # What the last process left is removed by the next, so there is never more than one.
        assert report["leftovers"] <= 1, report
        before = report["loaded"]
    assert before > 0
    assert any(report["leftovers"] for report in reports), "no kill fell into a save"


def test_sigterm_to_one_rank_in_a_collective_saves_on_both_and_ends_both(tmp_path: Path) -> None:
    stuck, loops = _start(tmp_path, ["stuck", "loops"], grace=20)
    stuck.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=30)[0] for process in (stuck, loops)]
    assert [stuck.returncode, loops.returncode] == [143, 143]
    assert ["closed" in output for output in outputs] == [False, True]
    assert _saved(tmp_path) == (3, {3.0})


def test_sigterm_to_all_ranks_is_one_stop(tmp_path: Path) -> None:
    processes = _start(tmp_path, ["loops", "loops"], grace=20)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [143, 143]
    assert [entry.version for entry in Store(tmp_path).entries()] == [3]


def test_a_signal_that_comes_twice_as_from_scheduler_and_launcher_is_one_stop(tmp_path: Path) -> None:
    processes = _start(tmp_path, ["loops", "loops"], grace=20)
    for process in [*processes, *processes]:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [143, 143]
    assert _saved(tmp_path) == (3, {3.0})


def test_ctrl_c_saves_too(tmp_path: Path) -> None:
    processes = _start(tmp_path, ["loops", "loops"], grace=20)
    processes[1].send_signal(signal.SIGINT)
    for process in processes:
        process.communicate(timeout=30)
    assert [process.returncode for process in processes] == [130, 130]
    assert _saved(tmp_path) == (3, {3.0})


def test_a_save_that_hangs_ends_with_the_grace_time(tmp_path: Path) -> None:
    (process,) = _start(tmp_path, ["loops-never"], grace=0.7)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert 0.5 < time.monotonic() - start < 10
    assert Store(tmp_path).entries() == []


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    (process,) = _start(tmp_path, ["loops-never"], grace=60)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_other_still_ends_within_the_grace_time(tmp_path: Path, victim: int) -> None:
    processes = _start(tmp_path, ["loops", "loops"], grace=2)
    dead, alive = processes[victim], processes[1 - victim]
    dead.kill()
    dead.communicate(timeout=30)
    start = time.monotonic()
    alive.send_signal(signal.SIGTERM)
    alive.communicate(timeout=30)
    assert alive.returncode == 143
    assert time.monotonic() - start < 10
    assert Store(tmp_path).entries() == []


def _start(folder: Path, modes: list[str], grace: float) -> list[subprocess.Popen[str]]:
    """Ranks, each in the middle of a step."""
    port = free_port()
    processes = []
    for rank, mode in enumerate(modes):
        launch = {"RANK": str(rank), "WORLD_SIZE": str(len(modes)), "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.ltf.checkpoint.stopped", str(folder), mode, str(grace)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=_environment() | launch, stdout=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "in a step\n"
    return processes


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def _saved(folder: Path) -> tuple[int, set[float]]:
    entry = Store(folder).latest()
    assert entry is not None
    manifest, tensors = load_tensors(entry)
    return manifest.version, set(tensors["weight"].flatten().tolist())
