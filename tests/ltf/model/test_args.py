from __future__ import annotations

from dataclasses import replace

import pytest

from ltf.model.args import ModelArgsError, MoEArgs, Stage
from tests.ltf.model.shapes import DENSE, MOE, moe


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"kv_heads": 3}, "kv_heads", "1, 2, 4"),
        ({"head_dim": 15}, "head_dim", "even"),
        ({"layers": 0}, "layers", "1 or more"),
        ({"layers": True}, "layers", "whole number"),
        ({"ffn_width": None}, "ffn_width", "2 layers are dense"),
        ({"norm_eps": float("nan")}, "norm_eps", "above 0"),
        ({"rope_theta": -1.0}, "rope_theta", "above 0"),
    ],
)
def test_a_wrong_shape_is_refused_with_its_field_value_and_fix(
    changes: dict[str, object], field: str, told: str
) -> None:
    with pytest.raises(ModelArgsError) as error:
        replace(DENSE, **changes)  # type: ignore[arg-type]
    assert error.value.field == field
    assert str(error.value).startswith(f"model.{field}: found {changes[field]!r}, expected ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 9}, "moe.top_k"),
        ({"top_k": 0}, "moe.top_k"),
        ({"top_k": (2, 2)}, "moe.top_k"),
        ({"top_k": ()}, "moe.top_k"),
        ({"dense_layers": 3}, "moe.dense_layers"),
        ({"dense_layers": 1}, "ffn_width"),
        ({"score": "softmax "}, "moe.score"),
        ({"balance_coefficient": -1.0}, "moe.balance_coefficient"),
        ({"route_scale": 0.0}, "moe.route_scale"),
    ],
)
def test_wrong_experts_are_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ModelArgsError) as error:
        moe(**changes)
    assert error.value.field == field


def test_one_renormalised_expert_is_refused_because_its_router_would_learn_nothing() -> None:
    with pytest.raises(ModelArgsError, match="router would learn nothing"):
        MoEArgs(experts=4, top_k=1, expert_width=8, renormalise=True)
    MoEArgs(experts=4, top_k=1, expert_width=8, renormalise=False)


def test_top_k_by_layer_counts_the_moe_layers_alone() -> None:
    args = replace(moe(top_k=4), ffn_width=8)
    by_layer = replace(
        args, moe=MoEArgs(experts=8, top_k=(4, 2), expert_width=8, dense_layers=1, renormalise=False)
    )
    assert [by_layer.top_k(i) for i in range(3)] == [0, 4, 2]
    assert [by_layer.is_moe(i) for i in range(3)] == [False, True, True]
    assert [args.top_k(i) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("layers", [(0, 3), (1, 0), (1, 1), (-1,)])
def test_a_stage_holds_layers_of_its_model_in_order(layers: tuple[int, ...]) -> None:
    with pytest.raises(ModelArgsError, match=r"stage\.layers"):
        Stage(layers).check(MOE)


def test_tied_ends_cannot_be_cut_apart() -> None:
    with pytest.raises(ModelArgsError, match="tied_embeddings"):
        Stage((0,), embed=True, head=False).check(replace(DENSE, tied_embeddings=True))
