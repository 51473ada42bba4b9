"""What may change between two attempts of a run, and what is refused or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .runs import Runs, Told
from .test_layouts import TOLERANCE

# Attempt by attempt: ranks, degrees, and the step up to which it gets.
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"expert": 2}),
    (2, {"pipeline": 2}),
    (1, {}),
    (4, {"expert": 2}),
]
EACH = 6


def next_samples(told: Told) -> dict[int, int]:
    """By step, from the manifests: the first sample not yet used."""
    found = {}
    for path in (told.folder / "checkpoints").glob("step-*/manifest.json"):
        progress = json.loads(path.read_text())["progress"]
        found[progress["step"]] = progress["next_sample"]
    return found


def stopped_at(folder: Path, step: int) -> None:
    """As if the run had been killed after that step: what is newer was never committed."""
    for newer in (folder / "checkpoints").glob("step-*"):
        if int(newer.name.removeprefix("step-")) > step:
            newer.rename(folder / f"later-{newer.name}-{len(list(folder.glob('later-*')))}")


@pytest.mark.timeout(300)
def test_from_layout_to_layout_the_losses_go_on_and_every_sample_is_read_once(runs: Runs) -> None:
    steps = EACH * len(LAYOUTS)
    common: dict[str, Any] = {"run__steps": steps, "checkpoint": {"every_steps": EACH, "keep_last": 99}}
    whole = runs.warm("whole", **common)
    for number, (world, degrees) in enumerate(LAYOUTS, 1):
        told = runs.warm("moved", world, parallel=degrees, **common)
        stopped_at(told.folder, EACH * number)
    starts = [event["step"] for event in told.events("resumed")]
    assert starts == [EACH * number for number in range(1, len(LAYOUTS))]
    assert told.losses == pytest.approx(whole.losses, abs=TOLERANCE)
    samples = runs.settings["batch"]["samples"]
    assert next_samples(told) == {step: step * samples for step in range(EACH, steps + 1, EACH)}
    assert "run.changed" not in told.findings


def test_another_micro_batch_changes_rounding_alone(runs: Runs) -> None:
    common: dict[str, Any] = {"checkpoint": {"every_steps": 4, "keep_last": 9}}
    whole = runs.warm("whole", **common)
    stopped_at(runs.warm("run", **common).folder, 4)
    told = runs.warm("run", batch__micro=4, **common)
    assert told.events("resumed")[0]["step"] == 4
    assert told.losses == pytest.approx(whole.losses, abs=2e-4)


def test_more_steps_make_a_run_that_was_done_go_on(runs: Runs) -> None:
    constant: dict[str, Any] = {"optimizer__decay": "constant"}
    whole = runs.warm("whole", run__steps=16, **constant)
    runs.warm("run", run__steps=12, **constant)
    told = runs.warm("run", run__steps=16, **constant)
    assert told.events("resumed")[0]["step"] == 12
    assert told.losses == whole.losses


CHANGES: dict[str, dict[str, Any]] = {
    "run.seed": {"run__seed": 4},
    "data.sources": {"data__sources.0.documents": [0, 0.5]},
    "data.seq_len": {"data__seq_len": 16},
    "batch.samples": {"batch__samples": 4},
}


@pytest.mark.parametrize("setting", CHANGES)
def test_what_changes_the_order_of_the_data_is_said_at_the_start(setting: str, runs: Runs) -> None:
    first = runs.warm("run")
    assert "run.changed" not in first.findings
    change = CHANGES[setting]
    if setting == "data.sources":
        [source] = runs.settings["data"]["sources"]
        change = {"data__sources": [{**source, "documents": [0, 0.5]}]}
    told = runs.warm("run", run__steps=13, **change)
    # A busy machine may add that a save was skipped.
    [finding] = [event for event in told.events("finding") if event["kind"] == "run.changed"]
    assert finding["severity"] == "warning"
    assert setting in finding["message"]
    assert 13 in told.losses


def test_a_change_of_who_computes_what_is_not_worth_a_word(runs: Runs) -> None:
    runs.warm("run", 2)
    told = runs.warm("run", 1, run__steps=13, batch__micro=4, output__log_every=3)
    assert "run.changed" not in told.findings


@pytest.mark.timeout(240)
def test_in_bf16_a_run_goes_on_bit_for_bit(runs: Runs) -> None:
    common: dict[str, Any] = {
        "precision__compute": "bf16",
        "parallel": {"recompute": "block"},
        "checkpoint": {"every_steps": 4, "keep_last": 9},
    }
    whole = runs.warm("whole", 2, **common)
    stopped_at(runs.warm("run", 2, **common).folder, 4)
    told = runs.warm("run", 2, **common)
    assert told.events("resumed")[0]["step"] == 4
    assert told.losses == whole.losses
    assert "run.changed" not in told.findings


def test_evaluation_in_a_pipeline_is_that_of_one_rank(runs: Runs, evaluation: dict[str, Any]) -> None:
    one = runs.warm("one", data__evaluation=evaluation)
    two = runs.warm("two", 2, data__evaluation=evaluation, parallel={"pipeline": 2})
    for mine, other in zip(one.events("evaluation"), two.events("evaluation"), strict=True):
        assert mine["step"] == other["step"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=TOLERANCE)


def test_the_guards_work_where_the_batch_is_divided_by_speed(runs: Runs) -> None:
    told = runs.warm(
        "run",
        2,
        environment={"LTF_DRILL": json.dumps({"fault": "nan_activation", "rank": 1, "step": 7, "layer": 2})},
        balance={"mode": "auto", "every_steps": 2, "window": 2, "threshold": 1.0},
        guard__corruption={"every_steps": 4},
    )
    found = [event for event in told.events("finding") if event["kind"].startswith(("finite.", "corr"))]
    assert [event["ranks"] for event in found if event["kind"] == "corruption.transient"] == [[1]]
    assert told.losses.keys() == set(range(1, 13))
    assert not any(event["skipped"] for event in told.events("step"))
