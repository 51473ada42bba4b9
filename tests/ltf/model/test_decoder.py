from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltf.model.args import InitArgs, InitScheme, ModelArgs, Stage
from ltf.model.aux_loss import router_losses
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from tests.ltf.model.shapes import COUNTED, DENSE, MOE, decoder, moe, tokens


def values(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    one, same, other = (values(decoder(MOE, seed=s)) for s in (1, 1, 2))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert "norm" in name or not torch.equal(one[name], other[name])


def test_no_two_parameters_or_experts_begin_alike() -> None:
    model = decoder(MOE)
    rows = [p.flatten()[:8] for n, p in model.named_parameters() if "norm" not in n and p.ndim == 2]
    rows += [m.flatten()[:8] for p in model.parameters() if p.ndim == 3 for m in p.unbind()]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_a_stage_begins_with_the_values_that_the_whole_model_has_there() -> None:
    whole = values(decoder(MOE))
    stage = Decoder(MOE, Stage((1, 2), embed=False, head=True))
    init_weights(stage, 1)
    held = values(stage)
    assert "embed.weight" not in held
    assert "layers.0.attention.q.weight" not in held
    assert all(torch.equal(value, whole[name]) for name, value in held.items())


@pytest.mark.parametrize("scheme", list(InitScheme))
def test_the_spread_of_each_matrix_is_the_one_asked_for(scheme: InitScheme) -> None:
    init = InitArgs(scheme=scheme, std=0.05, router_std=0.01)
    args = replace(MOE, width=128, layers=8, init=init)
    scale = math.sqrt(2 * 8) if scheme is InitScheme.SCALED_OUTPUT else 1.0
    for name, value in values(decoder(args)).items():
        if "norm" in name:
            assert (value == 1).all()
            continue
        expected = 0.01 if "router" in name else 0.05
        if name.endswith(("attention.o.weight", "experts.down")):
            expected /= scale
        assert value.std().item() == pytest.approx(expected, rel=0.1), name
        assert value.mean().item() == pytest.approx(0, abs=expected / 10), name


def test_weights_cannot_be_drawn_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder(MOE)
    with pytest.raises(ValueError, match="to_empty"):
        init_weights(model, 0)


@pytest.mark.parametrize("name", COUNTED)
def test_a_model_made_on_meta_and_then_filled_is_the_model_made_directly(name: str) -> None:
    args = COUNTED[name]
    with torch.device("meta"):
        model = Decoder(args)
    model = model.to_empty(device="cpu")
    init_weights(model, 1)
    x = tokens(args)
    with torch.no_grad():
        assert torch.equal(model(x).out, decoder(args)(x).out)
    for router in model.routers().values():
        assert router.expert_bias is None or (router.expert_bias == 0).all()


@pytest.mark.parametrize("args", [DENSE, MOE], ids=["dense", "experts"])
def test_stages_in_a_row_are_the_whole_model(args: ModelArgs) -> None:
    last = tuple(range(1, args.layers))
    stages = [Decoder(args, Stage((0,), head=False)), Decoder(args, Stage(last, embed=False))]
    for stage in stages:
        init_weights(stage, 1)
    x = tokens(args)
    ids = (torch.arange(12) >= 5).long().expand(2, 12)
    with torch.no_grad():
        between = stages[0](x, document_ids=ids)
        end = stages[1](between.out, document_ids=ids)
        whole = decoder(args)(x, document_ids=ids)
    assert torch.equal(end.out, whole.out)
    assert {**between.routing, **end.routing}.keys() == whole.routing.keys()


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    args = replace(DENSE, tied_embeddings=True)
    model = decoder(args)
    assert model.lm_head is None
    assert "lm_head.weight" not in model.state_dict()
    x = torch.zeros(1, 3, dtype=torch.int64)
    model(x).out.square().mean().backward()
    assert model.embed is not None
    assert model.embed.weight.grad is not None
    assert (model.embed.weight.grad.abs().amax(1) > 0).all()


def test_recomputed_layers_give_the_same_gradients_and_count_each_token_once() -> None:
    args = moe(z_coefficient=0.01, balance_coefficient=0.1)
    experts = args.moe
    assert experts is not None

    def gradients(recompute: bool) -> tuple[list[Tensor], list[Tensor]]:
        model = decoder(args)
        if recompute:
            for _, block in model.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        out = model(tokens(args))
        (out.out.square().mean() + router_losses(out.routing, experts).total).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], [
            stats.tokens_per_expert for stats in out.routing.values()
        ]

    (plain, counts), (again, counts_again) = gradients(False), gradients(True)
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(counts, counts_again, strict=True))
    assert all(int(c.sum()) == 24 * 2 for c in counts)


def test_the_bias_of_the_experts_is_in_the_state_and_stays_fp32() -> None:
    args = moe(bias_update_rate=1e-3)
    model = decoder(args)
    router = model.routers()[1]
    assert router.expert_bias is not None
    router.expert_bias[2] = 0.123456789
    model.to(torch.bfloat16)
    assert model.state_dict()["layers.1.ffn.router.expert_bias"][2].item() == pytest.approx(0.123456789)
    with torch.device("meta"):
        empty = Decoder(args)
    bias = empty.to(torch.bfloat16).to_empty(device="cpu").routers()[1].expert_bias
    assert bias is not None
    assert bias.dtype == torch.float32
    assert not bias.is_meta


@pytest.mark.parametrize(
    ("args", "dtype", "fullgraph"),
    [(DENSE, torch.float32, True), (MOE, torch.bfloat16, True), (MOE, torch.float32, False)],
    ids=["dense", "experts in bf16", "experts in fp32"],
)
def test_a_model_traces_with_the_same_result(args: ModelArgs, dtype: torch.dtype, fullgraph: bool) -> None:
    model, x = decoder(args, dtype=dtype), tokens(args)
    model(x).out.square().mean().backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    traced = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    traced(x).out.square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], plain)
