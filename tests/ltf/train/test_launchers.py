"""Real launches: torchrun, which starts a run again and passes signals on, and no launcher at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from .runs import ROOT, Runs, Told, latest, reached

LONG = 100_000


@dataclass
class Torchrun:
    process: subprocess.Popen[bytes]
    told: Told
    log: Path

    def when(self, happened: Callable[[list[dict[str, Any]]], bool], timeout: float = 100) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if (self.told.folder / "events-rank00000.jsonl").exists() and happened(self.told.events()):
                return
            time.sleep(0.02)
        raise AssertionError(f"it did not happen; the output was:\n{self.log.read_text()}")

    @property
    def workers(self) -> list[psutil.Process]:
        """The ranks of the attempt that is under way, in order."""
        pids = [self.told.events("run_started", rank)[-1]["pid"] for rank in (0, 1)]
        return [psutil.Process(pid) for pid in pids]

    def everyone(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@pytest.fixture
def torchrun(runs: Runs) -> Iterator[Callable[..., Torchrun]]:
    started: list[Torchrun] = []

    def start(*options: str, **overrides: Any) -> Torchrun:
        config = runs.config("run", {key.replace("__", "."): value for key, value in overrides.items()})
        log = runs.folder / "torchrun.log"
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*program, "--monitor-interval", "0.1", *options, "-m", "ltf", "train", str(config)],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    "PYTHONPATH": str(ROOT),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(Torchrun(process, Told(runs.folder / "run", []), log))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            for process in each.everyone():
                process.kill()
            each.process.wait()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.timeout(240)
def test_torchrun_starts_a_run_again_whose_rank_was_killed_and_it_continues_bit_for_bit(
    runs: Runs, torchrun: Callable[..., Torchrun], victim: int
) -> None:
    settings: dict[str, Any] = {"run__steps": 40, "checkpoint__every_steps": 4}
    whole = runs.warm("whole", 2, **settings)
    launched = torchrun("--max-restarts", "2", **settings)
    launched.when(lambda events: reached(9)(events) and any(e["event"] == "checkpoint_saved" for e in events))
    launched.workers[victim].kill()
    assert launched.process.wait(120) == 0, launched.log.read_text()
    told = launched.told
    assert [event["attempt"] for event in told.events("run_started")] == [0, 1]
    assert told.events("resumed")[0]["step"] >= 4
    assert told.losses == whole.losses
    assert all(event["loss"] == whole.losses[event["step"]] for event in told.events("step"))


@pytest.mark.parametrize(
    ("number", "to", "status"),
    [
        (signal.SIGTERM, "torchrun", 143),
        (signal.SIGTERM, "everyone", 143),
        (signal.SIGINT, "torchrun", 130),
    ],
)
@pytest.mark.timeout(240)
def test_torchrun_told_to_end_leaves_a_late_checkpoint_and_no_process(
    torchrun: Callable[..., Torchrun], number: int, to: str, status: int
) -> None:
    launched = torchrun(run__steps=LONG, checkpoint__every_steps=None)
    launched.when(reached(6))
    everyone = launched.everyone()
    # A scheduler signals all processes of a job, and torchrun its workers once more.
    for process in everyone if to == "everyone" else everyone[:1]:
        process.send_signal(number)
    launched.process.wait(60)
    told = launched.told
    [saved] = told.events("checkpoint_saved")
    assert saved["step"] >= max(told.losses) - 1
    assert (told.folder / "checkpoints" / f"step-{saved['step']:08d}" / "COMMITTED").exists()
    ends = [event for rank in (0, 1) for event in told.events("exited", rank)]
    assert {(event["status"], event["reason"]) for event in ends} == {(status, "signal")}
    _, alive = psutil.wait_procs(everyone[1:], timeout=5)
    assert alive == []


def test_a_mistake_under_torchrun_is_said_once(torchrun: Callable[..., Torchrun]) -> None:
    launched = torchrun("--max-restarts", "0", data__sources=[{"prefix": "nowhere"}])
    assert launched.process.wait(100) == 1  # torchrun's own
    said = [line for line in launched.log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "nowhere" in said[0]


def test_without_a_launcher_a_killed_run_is_one_process_that_goes_on(runs: Runs) -> None:
    whole = runs.warm("whole", run__steps=16)
    first = runs.start("run", run__steps=16)
    first.when(lambda events: any(e["event"] == "checkpoint_saved" for e in latest(events)))
    first.signal(signal.SIGKILL)
    first.wait()
    second = runs.start("run", run__steps=16).wait()
    assert second.statuses == [0]
    assert second.losses == whole.losses


@pytest.mark.parametrize("survivor", [0, 1])
def test_the_rank_that_outlives_the_other_ends_with_its_own_status(runs: Runs, survivor: int) -> None:
    """Threads that wait in torch for the dead rank do not abort the process at its end."""
    attempt = runs.start("run", 2, run__steps=LONG, checkpoint__every_steps=2)
    attempt.when(reached(5))
    attempt.signal(signal.SIGKILL, only=1 - survivor)
    told = attempt.wait(60)
    assert told.statuses[survivor] == 1
    said = [line for line in attempt.outputs[survivor].read_text().splitlines() if "lost the other" in line]
    assert len(said) == 1
    assert "terminate called" not in attempt.output()


def test_a_rank_that_stands_still_for_a_while_costs_only_time(runs: Runs) -> None:
    attempt = runs.start("run", 2, run__steps=30)
    attempt.when(reached(5))
    attempt.signal(signal.SIGSTOP, only=1)
    time.sleep(3)
    attempt.signal(signal.SIGCONT, only=1)
    told = attempt.wait()
    assert told.statuses == [0, 0]
    assert told.losses == runs.warm("whole", 2, run__steps=30).losses


def test_a_rank_that_stands_still_for_too_long_ends_the_run_and_the_next_attempt_goes_on(runs: Runs) -> None:
    attempt = runs.start("run", 2, run__steps=30, checkpoint__every_steps=2, parallel={"timeout_seconds": 4})
    attempt.when(lambda events: any(e["event"] == "checkpoint_saved" for e in events))
    attempt.signal(signal.SIGSTOP, only=1)
    assert attempt.children[0].wait(60) == 1
    attempt.signal(signal.SIGKILL, only=1)
    attempt.wait()
    again = runs.warm("run", 2, run__steps=30)
    assert again.losses == runs.warm("whole", 2, run__steps=30).losses
