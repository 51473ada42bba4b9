"""Killed anywhere and started again, a run goes on as if nothing had been."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from .runs import Runs, Told, latest, reached


def exact(told: Told) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, every bit of them."""
    return {event["step"]: (event["loss"], event["gradient_norm"]) for event in told.events("step")}


def saving(step: int) -> Any:
    """The save of that step has begun in this attempt, and is not done."""

    def happened(events: list[dict[str, Any]]) -> bool:
        kinds = [(e["event"], e["step"]) for e in latest(events) if e["event"].startswith("checkpoint_")]
        return ("checkpoint_started", step) in kinds

    return happened


@pytest.mark.timeout(300)
def test_a_run_killed_three_times_once_during_a_save_continues_bit_for_bit(runs: Runs) -> None:
    steps = 24
    whole = runs.warm("whole", 2, run__steps=steps)
    for moment in (reached(6), saving(12), reached(19)):
        attempt = runs.start("killed", 2, run__steps=steps)
        attempt.when(moment)
        attempt.signal(signal.SIGKILL)
        assert attempt.wait().statuses == [-signal.SIGKILL, -signal.SIGKILL]
    told = runs.warm("killed", 2, run__steps=steps)
    assert exact(told) == exact(whole)
    assert len(told.events("run_started")) == 4
    resumed = [event["step"] for event in told.events("resumed")]
    assert len(resumed) == 3
    assert resumed[0] == 4
    assert resumed == sorted(resumed)
    # A repeated step gave the same bits each time, not only the last.
    for event in told.events("step"):
        assert event["loss"] == exact(whole)[event["step"]][0]


def test_everything_a_step_depends_on_is_in_the_checkpoint(runs: Runs) -> None:
    """Biases, loads of the batch before, guards and a blend of two sources, over two attempts."""
    prefix = runs.settings["data"]["sources"][0]["prefix"]
    settings = {
        "model__moe__bias_update_rate": 1e-2,
        "model__moe__score": "sigmoid",
        "data__sources": [
            {"prefix": prefix, "documents": [0, 0.5], "weight": 2},
            {"prefix": prefix, "documents": [0.5, 1], "weight": 1},
        ],
        "data__mask_boundaries": True,
        "data__packing": "best_fit",
        "checkpoint__keep_every": 4,
        "optimizer__decay_steps": 5,
    }
    whole = runs.warm("whole", 2, **settings)
    for newer in (runs.folder / "whole" / "checkpoints").glob("step-*1[0-9]*"):
        newer.rename(runs.folder / newer.name)
    again = runs.warm("whole", 2, **settings)
    [resumed] = again.events("resumed")
    first, second = ({}, {})
    for event in again.events("step"):
        (first if event["attempt"] == 0 else second)[event["step"]] = event["loss"]
    assert min(second) == resumed["step"] + 1 == 9
    assert second == {step: loss for step, loss in first.items() if step in second}
    assert whole.folder == again.folder


def test_a_run_that_is_done_has_nothing_more_to_do(runs: Runs) -> None:
    first = runs.warm("run")
    again = runs.warm("run")
    assert len(again.events("step")) == len(first.losses)
    assert again.events("resumed")[0]["step"] == 12
    assert again.events("exited")[-1]["status"] == 0


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_on_another_number_of_ranks_the_samples_go_on_where_they_were(
    runs: Runs, first: int, second: int
) -> None:
    whole = runs.warm("whole", first, run__steps=16)
    runs.warm("changed", first, run__steps=16, checkpoint__at_end=False, checkpoint__every_steps=8)
    for folder in (runs.folder / "changed" / "checkpoints").glob("step-*16"):
        folder.rename(runs.folder / folder.name)
    changed = runs.warm("changed", second, run__steps=16)
    assert changed.events("resumed")[0]["step"] == 8
    later = [e for e in changed.events("step") if e["attempt"] == 1]
    assert [e["step"] for e in later] == list(range(9, 17))
    for event in later:
        assert event["loss"] == pytest.approx(whole.losses[event["step"]], abs=2e-4)


def test_a_checkpoint_with_one_flipped_bit_is_set_aside_and_the_one_before_is_used(runs: Runs) -> None:
    whole = runs.warm("run", 2)
    newest = max((whole.folder / "checkpoints").glob("step-*"))
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    again = runs.warm("run", 2)
    assert again.findings == ["checkpoint.quarantined"]
    assert again.events("resumed")[0]["step"] == 8
    assert not newest.exists() or newest in {max((whole.folder / "checkpoints").glob("step-*"))}
    assert exact(again) == exact(whole)
