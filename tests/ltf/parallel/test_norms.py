"""Norms are those of the whole model, however it is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from ltf.config.schema import Config, Parallel, Run
from ltf.model.args import Stage
from ltf.model.decoder import Decoder
from ltf.parallel import norms, shard
from ltf.parallel.world import join
from tests.ltf import ranks
from tests.ltf.model.shapes import MOE, decoder


def _with_gradients(seed: int = 5) -> Decoder:
    model = decoder(MOE, seed=seed)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin()
    return model


def _of_stages() -> tuple[norms.Norms, norms.Norms]:
    """Two stages, two copies of each; a gradient is a function of its parameter."""
    config = Config(
        run=Run(seed=5, device="cpu"),
        model=MOE,
        parallel=Parallel(pipeline=2, replicate=2, shard=1, timeout_seconds=60),
    )
    world = join(config.parallel, "cpu")
    try:
        first = world.layout.place(world.rank).pipeline == 0
        stage = Stage((0,), head=False) if first else Stage((1, 2), embed=False)
        parameters = shard.named_shards(shard.build(MOE, stage, world, config))
        for _, parameter in parameters:
            parameter.grad = parameter.detach().clone()
            shard.local(parameter.grad).sin_()
        return (
            norms.gradient_norms(parameters, world, MOE.layers),
            norms.parameter_norms(parameters, world, MOE.layers),
        )
    finally:
        world.close()


def _expected(tensors: dict[str, torch.Tensor]) -> norms.Norms:
    def length(prefix: str) -> float:
        return math.sqrt(
            sum(float(t.double().square().sum()) for n, t in tensors.items() if n.startswith(prefix))
        )

    return norms.Norms(length(""), {layer: length(f"layers.{layer}.") for layer in range(MOE.layers)})


def _same(got: norms.Norms, expected: norms.Norms) -> None:
    assert got.total == pytest.approx(expected.total, rel=1e-9)
    assert got.layers == pytest.approx(expected.layers, rel=1e-9)


def test_one_rank_measures_what_the_definition_says() -> None:
    model = _with_gradients()
    world = join(Parallel(), "cpu", {})
    try:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        _same(norms.gradient_norms(model.named_parameters(), world, MOE.layers), _expected(gradients))
        values = {n: p.detach() for n, p in model.named_parameters()}
        _same(norms.parameter_norms(model.named_parameters(), world, MOE.layers), _expected(values))
    finally:
        world.close()


def test_stages_and_copies_count_every_parameter_once() -> None:
    model = _with_gradients()
    by_gradient = _expected({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    by_value = _expected({n: p.detach() for n, p in model.named_parameters()})
    answers = ranks.run(_of_stages, 4)
    assert answers == [answers[0]] * 4
    _same(answers[0][0], by_gradient)
    _same(answers[0][1], by_value)


@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_clipping_is_that_of_torch(limit: float) -> None:
    ours, theirs = _with_gradients(), _with_gradients()
    norm = float(clip_grad_norm_(theirs.parameters(), limit))
    factor = norms.clip_(ours.named_parameters(), norm, limit)
    assert factor == pytest.approx(min(1.0, limit / norm), rel=1e-6)
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, torchs.grad)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_clipping_by_a_norm_that_is_no_number_hides_nothing(norm: float) -> None:
    model = _with_gradients()
    assert math.isnan(norms.clip_(model.named_parameters(), norm, 1.0))
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())
