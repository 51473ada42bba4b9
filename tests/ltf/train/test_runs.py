"""A run from its start to its end, and what it tells."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from ltf.events import SCHEMA

from .runs import Runs


def test_a_run_learns_and_tells_every_step(runs: Runs) -> None:
    told = runs.warm("run", run__steps=40)
    assert list(told.losses) == list(range(1, 41))
    assert told.losses[1] == pytest.approx(5.6, abs=0.15)  # ln 272: nothing is known yet
    assert told.losses[40] < 3.6
    [started] = told.events("run_started")
    assert started["world"] == 1
    assert started["config"]["model"]["layers"] == 4
    [ended] = told.events("exited")
    assert (ended["status"], ended["reason"], ended["step"]) == (0, "finished", 40)
    assert told.findings == []


def test_every_event_of_a_run_fits_the_schema(runs: Runs, evaluation: dict[str, Any]) -> None:
    told = runs.warm(
        "run",
        2,
        environment={"LTF_DRILL": json.dumps({"fault": "nan_gradient", "rank": 1, "step": 5})},
        data__evaluation=evaluation,
    )
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    kinds = set()
    for rank in range(2):
        for event in told.events(rank=rank):
            validator.validate(event)
            kinds.add(event["event"])
    assert kinds >= {"run_started", "step", "evaluation", "checkpoint_started", "checkpoint_saved", "finding"}
    assert kinds >= {"heartbeat", "exited"}


def test_the_same_seed_and_ranks_give_the_same_bits(runs: Runs) -> None:
    first, second = runs.warm("first", 2), runs.warm("second", 2)
    assert first.losses == second.losses
    assert [e["gradient_norm"] for e in first.events("step")] == [
        e["gradient_norm"] for e in second.events("step")
    ]


def test_another_seed_gives_another_run(runs: Runs) -> None:
    assert runs.warm("first").losses != runs.warm("second", run__seed=4).losses


def test_evaluation_uses_the_same_samples_each_time_and_leaves_training_as_it_was(
    runs: Runs, evaluation: dict[str, Any]
) -> None:
    judged = runs.warm("judged", 2, data__evaluation=evaluation, optimizer__lr=1e-9)
    plain = runs.warm("plain", 2, optimizer__lr=1e-9)
    assert judged.losses == plain.losses
    losses = [event["loss"] for event in judged.events("evaluation")]
    assert [event["step"] for event in judged.events("evaluation")] == [4, 8, 12]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)  # the weights hardly move
