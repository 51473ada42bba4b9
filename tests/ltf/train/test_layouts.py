"""Every way to divide the work gives the losses of one rank.

In fp32 a sum's order is all that differs between layouts. Over 50 steps of AdamW such rounding grows; a
token whose two best experts are nearly equal may then choose the other. The tolerance leaves room for that.
"""

from __future__ import annotations

from typing import Any

import pytest

from .runs import Runs, Told

STEPS = 50
TOLERANCE = 2e-3
"""Of the loss, absolute, in nats; the losses fall from 5.6 to about 3."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "shard 2": (2, {}),
    "replicate 2": (2, {"replicate": 2}),
    "replicate 2 x shard 2": (4, {"replicate": 2}),
    "expert 2": (2, {"expert": 2}),
    "expert 2 x shard 2": (4, {"expert": 2}),
    "expert 4, topology-aware": (4, {"expert": 4, "exchange": "topology"}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "schedule": "interleaved"}),
    "pipeline 2, zero bubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}),
    "pipeline 2 x expert 2": (4, {"pipeline": 2, "expert": 2}),
    "pipeline 2 x shard 2": (4, {"pipeline": 2}),
    "shard 2, recomputed, gathered once": (2, {"recompute": "block", "reshard": False}),
}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Told]:
    """Runs on one rank by the kind of model, made when they are first needed."""
    return {}


def losses_of_one(runs: Runs, known: dict[str, Told], kind: str, **settings: Any) -> dict[int, float]:
    if kind not in known:
        known[kind] = runs.warm(f"one-{kind}", run__steps=STEPS, **settings)
    return known[kind].losses


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.timeout(180)
def test_a_mixture_of_experts_learns_the_same_in_every_layout(
    layout: str, runs: Runs, one_rank: dict[str, Told]
) -> None:
    expected = losses_of_one(runs, one_rank, "moe")
    world, degrees = LAYOUTS[layout]
    environment = {}
    if degrees.get("exchange") == "topology":
        environment = {"LTP_NODE": "node"}
    told = runs.warm("run", world, environment, run__steps=STEPS, parallel=degrees)
    assert told.losses.keys() == expected.keys()
    worst = max(abs(told.losses[step] - expected[step]) for step in expected)
    assert worst < TOLERANCE, f"{layout}: losses differ by up to {worst:.2e}"
    assert expected[STEPS] < expected[1] - 1.5


@pytest.mark.timeout(180)
def test_a_dense_model_with_masked_documents_learns_the_same_in_a_pipeline(
    runs: Runs, one_rank: dict[str, Told]
) -> None:
    del runs.settings["model"]["moe"]
    runs.settings["model"]["ffn_width"] = 64
    runs.settings["data"]["mask_boundaries"] = True
    expected = losses_of_one(runs, one_rank, "dense")
    told = runs.warm("run", 4, run__steps=STEPS, parallel={"pipeline": 2})
    worst = max(abs(told.losses[step] - expected[step]) for step in expected)
    assert worst < 2e-4
