"""Slow ranks in whole runs: found and named, and given less of the same batch.

A rank is slowed on purpose, by a multiple that no other work on this machine reaches; `benchmarks.balance`
slows one by a process that shares its core.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from .runs import Runs, Told

QUICK = {"slow_steps": 8, "slow_factor": 1.3, "jitter_factor": 1e6, "lost_seconds": 0.0}
"""A finding about steps of milliseconds; jitter is not what these tests are about."""
DRILLED = {**QUICK, "slow_factor": 4.0}
"""A drilled rank is slower than that; no noise makes another one so."""
AUTO = {"mode": "auto", "every_steps": 4, "window": 4, "saved_seconds": 0.0}
TOLERANCE = 2e-3
"""Of the loss, in nats: as between layouts, since sums are taken in another order."""


def plans(told: Told) -> list[dict[str, Any]]:
    return told.events("balance")


def same_losses(told: Told, expected: Told, tolerance: float = TOLERANCE) -> None:
    assert told.losses.keys() == expected.losses.keys()
    for step, loss in expected.losses.items():
        assert told.losses[step] == pytest.approx(loss, abs=tolerance), f"step {step}"


def slow(rank: int, *others: dict[str, Any], seconds: float = 0.2, step: int = 0) -> dict[str, str]:
    order = {"fault": "slow", "rank": rank, "step": step, "seconds": seconds}
    return {"LTF_DRILL": json.dumps([order, *others])}


def test_a_drill_of_a_slow_rank_is_found_and_named(runs: Runs) -> None:
    told = runs.warm("run", 2, slow(1, step=10), run__steps=20, noise=DRILLED)
    [found] = [event for event in told.events("finding") if event["kind"] == "slow_rank"]
    assert found["ranks"] == [1]
    assert found["evidence"]["factor"] >= DRILLED["slow_factor"]
    assert 10 - QUICK["slow_steps"] <= found["evidence"]["since"] <= 11


def test_a_slow_rank_gets_fewer_micro_batches_and_every_loss_stays(runs: Runs) -> None:
    del runs.settings["model"]["moe"]
    runs.settings["model"]["ffn_width"] = 64
    common: dict[str, Any] = {"batch": {"samples": 12, "micro": 1}, "noise": DRILLED}
    static = runs.warm("static", 2, **common)
    told = runs.warm("auto", 2, slow(1, seconds=0.1), balance=AUTO, **common)
    assert plans(static) == []
    made = plans(told)
    assert made
    fast, slowed = made[-1]["counts"]
    assert slowed < 6 < fast
    assert fast + slowed == 12
    assert made[0]["counts_before"] == [6, 6]
    assert made[0]["seconds_after"] < made[0]["seconds_before"]
    same_losses(told, static, 2e-4)


def test_slowness_that_has_cost_nothing_worth_telling_is_not_told(runs: Runs) -> None:
    told = runs.warm("run", 2, slow(1), run__steps=14, noise={**DRILLED, "lost_seconds": 60.0})
    assert told.findings == ["drill.armed"]


@pytest.mark.parametrize(
    ("world", "parallel", "rank", "uneven"),
    [
        (4, {"expert": 2}, 3, [3, 1]),
        (4, {"pipeline": 2}, 1, [6, 2]),
        (4, {"pipeline": 2}, 2, [2, 6]),
        (2, {"recompute": "block"}, 0, [1, 7]),
    ],
)
@pytest.mark.timeout(180)
def test_the_unit_of_a_slow_rank_takes_less_in_every_layout(
    runs: Runs, world: int, parallel: dict[str, Any], rank: int, uneven: list[int]
) -> None:
    common: dict[str, Any] = {"batch": {"samples": 8, "micro": 1}, "parallel": parallel, "noise": DRILLED}
    static = runs.warm("static", world, **common)
    told = runs.warm("auto", world, slow(rank), balance=AUTO, **common)
    assert [plan["counts"] for plan in plans(told)][:1] == [uneven]
    same_losses(told, static)
    blamed = [event["ranks"] for event in told.events("finding") if event["kind"] == "slow_rank"]
    assert blamed == [[rank]]


def test_replays_and_partners_agree_under_an_uneven_plan_and_find_a_flipped_bit(runs: Runs) -> None:
    static = runs.warm("static", 2, run__steps=14)
    flip = {"fault": "bitflip_gradient", "rank": 0, "step": 12, "layer": 1, "bit": 20}
    # The sixth step is replayed here and by partners with clean results, the twelfth with the flipped bit.
    told = runs.warm(
        "auto", 2, slow(1, flip), run__steps=14, balance=AUTO, guard__corruption={"every_steps": 6}
    )
    assert plans(told)[0]["step"] == 4
    assert plans(told)[0]["counts"] == [3, 1]
    [finding] = [event for event in told.events("finding") if event["kind"].startswith("corruption.")]
    assert (finding["kind"], finding["ranks"]) == ("corruption.transient", [0])
    same_losses(told, static)


@pytest.mark.parametrize(("world", "parallel"), [(2, {}), (4, {"pipeline": 2})])
@pytest.mark.timeout(180)
def test_evaluations_under_an_uneven_plan_give_the_same(
    runs: Runs, evaluation: dict[str, Any], world: int, parallel: dict[str, Any]
) -> None:
    common: dict[str, Any] = {
        "data__evaluation": evaluation, "parallel": parallel, "batch": {"samples": 8, "micro": 1},
    }  # fmt: skip
    static = runs.warm("static", world, **common)
    told = runs.warm("auto", world, slow(world - 1), balance=AUTO, **common)
    assert plans(told)
    same_losses(told, static)
    expected = {event["step"]: event["loss"] for event in static.events("evaluation")}
    found = {event["step"]: event["loss"] for event in told.events("evaluation")}
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert list(found) == [4, 8, 12]


def keep_up_to(told: Told, step: int) -> None:
    """Set later checkpoints aside."""
    for folder in (told.folder / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            folder.rename(told.folder / folder.name)


def second(told: Told, kind: str) -> list[dict[str, Any]]:
    return [event for event in told.events(kind) if event["attempt"] == 1]


def test_a_plan_goes_on_after_a_resume(runs: Runs) -> None:
    common: dict[str, Any] = {
        "run__steps": 18,
        "balance": {**AUTO, "every_steps": 8},
        "checkpoint": {"every_steps": 4, "keep_last": 9},
    }
    static = runs.warm("static", 2, run__steps=18)
    first = runs.warm("auto", 2, slow(1), **common)
    assert [(plan["step"], plan["counts"]) for plan in plans(first)] == [(8, [3, 1])]
    keep_up_to(first, 12)
    # Now the other one is slow; that it had more to do came from the checkpoint.
    again = runs.warm("auto", 2, slow(0), **common)
    assert second(again, "resumed")[0]["step"] == 12
    changed = [(plan["step"], plan["counts_before"], plan["counts"]) for plan in second(again, "balance")]
    assert changed == [(16, [3, 1], [1, 3])]
    same_losses(again, static)


def test_a_plan_that_was_due_at_the_checkpoints_step_is_made_at_the_resume(runs: Runs) -> None:
    common: dict[str, Any] = {
        "balance": {**AUTO, "every_steps": 8},
        "checkpoint": {"every_steps": 4, "keep_last": 9},
    }
    whole = runs.warm("auto", 2, slow(1), **common)
    keep_up_to(whole, 8)
    again = runs.warm("auto", 2, slow(1), **common)
    assert second(again, "resumed")[0]["step"] == 8
    [before, after] = plans(again)
    assert (after["step"], after["counts"]) == (before["step"], before["counts"]) == (8, [3, 1])
    assert after["attempt"] == 1


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [1, 3])
def test_on_another_number_of_ranks_the_plan_is_dropped(runs: Runs, world: int) -> None:
    common: dict[str, Any] = {"balance": AUTO, "checkpoint": {"every_steps": 4, "keep_last": 9}}
    static = runs.warm("static", 2)
    first = runs.warm("auto", 2, slow(1), **common)
    assert plans(first)[0]["counts"] == [3, 1]
    keep_up_to(first, 8)
    common["balance"] = {**AUTO, "every_steps": 100}
    again = runs.warm("auto", world, **common)
    assert second(again, "resumed")[0]["step"] == 8
    assert second(again, "balance") == []
    same_losses(again, static)
