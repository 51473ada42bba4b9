"""Ranks that share a model train it as one rank would."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltf.model.decoder import Decoder
from ltf.model.hf import export
from ltf.model.init import init_weights
from tests.ltf import ranks
from tests.ltf.model.shapes import decoder, moe
from tests.ltf.parallel.training import ARGS, Case, Trained, train


@functools.cache
def _alone(args: Any = ARGS) -> Trained:
    trained: Trained = ranks.run(train, 1, Case(args=args))[0]
    return trained


def _agree(got: Trained, expected: Trained) -> None:
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    for step, found in enumerate(expected.norms):
        assert got.norms[step].total == pytest.approx(found.total, rel=1e-4)
        assert got.norms[step].layers == pytest.approx(found.layers, rel=1e-4)
    assert got.parameter_norms.total == pytest.approx(expected.parameter_norms.total, rel=1e-12)
    assert got.parameter_norms.layers == pytest.approx(expected.parameter_norms.layers, rel=1e-12)
    for name, value in expected.initial.items():
        assert torch.equal(got.initial[name], value), name
    # Sums of the same fp32 numbers in another order.
    torch.testing.assert_close(got.gradients, expected.gradients, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(got.final, expected.final, rtol=1e-3, atol=2e-5)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "replicate 2": (2, {"replicate": 2}),
    "shard 2": (2, {"shard": 2}),
    "shard 2, gathered once": (2, {"shard": 2, "reshard": False}),
    "shard 2, recomputed": (2, {"shard": 2, "recompute": "block"}),
    "expert 2": (2, {"shard": 2, "expert": 2}),
    "expert 2, recomputed": (2, {"shard": 2, "expert": 2, "recompute": "block"}),
    "expert 2, gathered once, by topology": (
        2,
        {"shard": 2, "expert": 2, "reshard": False, "exchange": "topology"},
    ),
    "replicate 2, shard 2": (4, {"replicate": 2, "shard": 2}),
    "expert 2, each sharded by 2": (4, {"shard": 4, "expert": 2}),
    "replicate 2, expert 2": (4, {"replicate": 2, "shard": 2, "expert": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_rank_does(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    _agree(ranks.run(train, world, Case(parallel=parallel))[0], _alone())


def test_first_values_are_those_that_one_process_draws() -> None:
    model = Decoder(ARGS)
    init_weights(model, 5)
    for name, value in model.named_parameters():
        assert torch.equal(_alone().initial[name], value), name


def test_recomputation_changes_no_bit() -> None:
    parallel = {"shard": 2, "expert": 2}
    kept, recomputed = (
        ranks.run(train, 2, Case(parallel={**parallel, "recompute": recompute}))[0]
        for recompute in ("none", "block")
    )
    assert recomputed.losses == kept.losses
    for name, value in kept.final.items():
        assert torch.equal(recomputed.final[name], value), name


def test_the_same_run_gives_the_same_bits_again() -> None:
    case = Case(parallel={"shard": 4, "expert": 2})
    first, second = (ranks.run(train, 4, case)[0] for _ in range(2))
    assert (first.losses, first.norms) == (second.losses, second.norms)
    for name, value in first.final.items():
        assert torch.equal(second.final[name], value), name


@pytest.mark.parametrize(
    ("world", "parallel", "shares"),
    [(2, {"shard": 2}, [5, 3]), (4, {"shard": 4, "expert": 2}, [3, 3, 1, 1])],
)
def test_units_may_take_unequal_numbers_of_micro_batches(
    world: int, parallel: dict[str, Any], shares: list[int]
) -> None:
    case = Case(parallel=parallel, balance="auto", shares=shares, evaluations=True)
    _agree(ranks.run(train, world, case)[0], _alone())


@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (2, {"shard": 2}), (2, {"shard": 2, "expert": 2, "recompute": "block"})]
)
def test_bf16_computes_in_bf16_but_keeps_masters_gradients_and_routers_fp32(
    world: int, parallel: dict[str, Any]
) -> None:
    trained = ranks.run(train, world, Case(parallel=parallel, precision={"compute": "bf16"}))[0]
    gathered = {n.removeprefix("gathered "): d for n, d in trained.dtypes.items() if n.startswith("gathered")}
    assert gathered["layers.0.attention.q.weight"] == torch.bfloat16
    assert gathered["layers.0.ffn.router.weight"] == torch.float32
    assert trained.dtypes["hidden"] == torch.bfloat16
    assert trained.dtypes["router weights"] == torch.float32
    assert {value.dtype for value in (*trained.final.values(), *trained.gradients.values())} == {
        torch.float32
    }
    assert trained.losses == pytest.approx(_alone().losses, rel=0.02)
    for name, value in _alone().initial.items():
        assert torch.equal(trained.initial[name], value), name


def test_compiled_layers_train_as_others_do() -> None:
    args = replace(ARGS, layers=1)
    parallel = {"shard": 2, "expert": 2, "compile": True, "recompute": "block"}
    compiled = ranks.run(train, 2, Case(parallel=parallel, args=args, steps=1), timeout=110)[0]
    plain = ranks.run(train, 2, Case(parallel={**parallel, "compile": False}, args=args, steps=1))[0]
    _agree(compiled, plain)


def test_saved_weights_take_the_place_of_random_ones_in_every_rank(tmp_path: Path) -> None:
    saved = decoder(ARGS, seed=9)
    export(saved.state_dict(), ARGS, tmp_path / "model")
    case = Case(parallel={"shard": 4, "expert": 2}, steps=0, initial_weights=tmp_path / "model")
    initial = ranks.run(train, 4, case)[0].initial
    for name, value in saved.named_parameters():
        assert torch.equal(initial[name], value), name


def test_experts_that_do_not_divide_are_refused_with_the_arithmetic() -> None:
    case = Case(parallel={"shard": 2, "expert": 2}, args=moe(experts=7))
    with pytest.raises(
        ranks.RankFailed, match=r"model.moe.experts 7 does not divide among parallel.expert 2"
    ):
        ranks.run(train, 2, case)
