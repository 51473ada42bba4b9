"""Faults made on purpose, in whole runs: found, named, and answered as configured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .runs import Runs


def drill(**order: Any) -> dict[str, str]:
    return {"LTF_DRILL": json.dumps(order)}


def test_a_rank_that_makes_nan_is_named_and_the_step_changes_nothing(runs: Runs) -> None:
    told = runs.warm(
        "run",
        2,
        drill(fault="nan_activation", rank=1, step=5, layer=2),
        guard__corruption={"on_suspicion": False, "every_steps": None},
    )
    [finding] = [e for e in told.events("finding") if e["kind"].startswith("finite.")]
    assert finding["ranks"] == [1]
    assert finding["where"][0]["rank"] == 1
    assert "layer 2" in finding["message"]
    skipped = [event["step"] for event in told.events("step") if event["skipped"]]
    assert skipped == [5]
    assert told.losses[12] < told.losses[1]


def test_one_flipped_bit_in_a_gradient_is_repaired_and_the_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    clean = runs.warm("clean", 2, run__steps=10)
    told = runs.warm(
        "run",
        2,
        drill(fault="bitflip_gradient", rank=1, step=6, layer=1, bit=20),
        run__steps=10,
        guard__corruption={"every_steps": 6},
    )
    [finding] = [e for e in told.events("finding") if e["kind"].startswith("corruption.")]
    assert finding["kind"] == "corruption.transient"
    assert finding["ranks"] == [1]
    assert told.losses == clean.losses


def test_a_device_that_always_computes_wrong_stops_the_run_by_name(runs: Runs) -> None:
    told = runs.warm(
        "run",
        4,
        drill(fault="bitflip_matmul", rank=2, step=3, layer=1, persistent=True),
        status=1,
        guard__corruption={"every_steps": 6},
    )
    [finding] = [e for e in told.events("finding") if e["kind"].startswith("corruption.")]
    assert finding["kind"] == "corruption.persistent"
    assert finding["ranks"] == [2]
    ended = told.events("exited")[-1]
    assert (ended["status"], ended["reason"]) == (1, "guard")
    assert max(told.losses) == 6


def test_after_a_spike_the_run_goes_back_and_passes_over_the_samples(runs: Runs) -> None:
    told = runs.warm(
        "run",
        2,
        drill(fault="bitflip_gradient", rank=0, step=30, layer=1, bit=30),
        run__steps=36,
        optimizer__warmup_steps=1,
        # So small a model's norms jump by themselves when its routing turns over; a flipped exponent is more.
        guard__spikes={"answer": "roll_back", "warmup": 16, "window": 16, "norm_z": 1e6},
        guard__corruption={"enabled": False},
    )
    assert any(kind.startswith("spike.") for kind in told.findings)
    rolled = [e for e in told.events("resumed") if e["reason"] == "roll_back"]
    assert [e["step"] for e in rolled] == [28]
    steps = [event["step"] for event in told.events("step")]
    assert steps.count(29) == 2
    assert steps[-1] == 36


def test_a_clean_run_finds_nothing(runs: Runs) -> None:
    told = runs.warm("run", 2, run__steps=60, guard__corruption={"every_steps": 10})
    assert told.findings == []


@pytest.mark.parametrize("kind", ["nan_gradient", "nan_activation"])
def test_a_transient_nan_is_repaired_by_the_replay(runs: Runs, kind: str) -> None:
    clean = runs.warm("clean", 2)
    told = runs.warm("run", 2, drill(fault=kind, rank=0, step=7, layer=1))
    assert told.losses == clean.losses
    found = {e["kind"]: e for e in told.events("finding")}
    assert found["corruption.transient"]["ranks"] == [0]
    # What was seen at first stays told, with the layer, but asks for nothing.
    [seen] = [event for kind, event in found.items() if kind.startswith("finite.")]
    assert (seen["severity"], seen["step"], seen["ranks"]) == ("info", 7, [0])
    assert "layer 1" in seen["message"]
