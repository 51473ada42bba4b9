from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ltf.model.args import BalanceLoss, ModelArgs, ScoreFunction
from ltf.model.experts import Experts, can_group, grouped_linear
from ltf.model.moe import MoE
from tests.ltf.model.shapes import COUNTED, MOE, decoder, moe, tokens

SPARSE = {name: args for name, args in COUNTED.items() if args.moe is not None}


def layer(args: ModelArgs, index: int, dtype: torch.dtype) -> MoE:
    ffn = decoder(args, dtype=dtype).layers[str(index)].ffn
    assert isinstance(ffn, MoE)
    return ffn


def one_token(module: MoE, args: ModelArgs, token: Tensor) -> Tensor:
    """The layer for one token, expert after expert."""
    assert args.moe is not None
    logits = module.router.weight @ token
    scores = logits.sigmoid() if args.moe.score is ScoreFunction.SIGMOID else logits.softmax(0)
    bias = module.router.expert_bias
    ranked = sorted(
        range(args.moe.experts), key=lambda e: -float(scores[e] + (0 if bias is None else bias[e]))
    )
    chosen = ranked[: module.router.top_k]
    whole = sum(scores[e] for e in chosen) if args.moe.renormalise else 1.0
    out = torch.zeros_like(token)
    for e in chosen:
        gate, up = (module.experts.gate_up[e] @ token).chunk(2)
        out = out + scores[e] / whole * args.moe.route_scale * (module.experts.down[e] @ (F.silu(gate) * up))
    if module.shared is not None:
        gate, up = (module.shared.gate_up.weight @ token).chunk(2)
        out = out + module.shared.down.weight @ (F.silu(gate) * up)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_the_layer_is_each_tokens_weighted_sum_of_its_experts(name: str, dtype: torch.dtype) -> None:
    args = SPARSE[name]
    for index in args.moe_layers:
        module = layer(args, index, dtype)
        x = torch.randn(2, 5, args.width, dtype=dtype, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            out, stats = module(x)
            expected = torch.stack([one_token(module, args, t) for t in x.view(-1, args.width)]).view_as(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert int(stats.tokens_per_expert.sum()) == 10 * args.top_k(index)


def test_a_scale_multiplies_what_the_routed_experts_give() -> None:
    args = moe(route_scale=2.5)
    x = torch.randn(1, 4, args.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scaled, _ = layer(args, 0, torch.float64)(x)
        plain, _ = layer(moe(), 0, torch.float64)(x)
    torch.testing.assert_close(scaled, 2.5 * plain)


def test_the_grouped_kernel_and_the_loop_give_the_same_gradients() -> None:
    grouped, looped = layer(MOE, 0, torch.float32), layer(MOE, 0, torch.float64)
    x = torch.randn(2, 9, MOE.width, generator=torch.Generator().manual_seed(4))
    assert can_group(x, grouped.experts.gate_up)
    assert not can_group(x.double(), looped.experts.gate_up)
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    for module, each in zip((grouped, looped), inputs, strict=True):
        module(each)[0].square().sum().backward()
    found, expected = ([p.grad for p in module.parameters()] for module in (grouped, looped))
    assert None not in found
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=1e-4, atol=1e-6)


def test_rows_that_are_no_multiple_of_sixteen_bytes_take_the_loop_and_agree() -> None:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    assert not can_group(x, weight)
    out = grouped_linear(x, weight, torch.tensor([2, 4]))
    torch.testing.assert_close(out, torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[1].T)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[4, 0, 3, 0], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
def test_experts_without_tokens_give_nothing_and_get_zero_gradients(
    counts: list[int], dtype: torch.dtype
) -> None:
    experts = Experts(4, 16, 8).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    x = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    out = experts(x, torch.tensor(counts))
    assert out.shape == x.shape
    out.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        touched = parameter.grad.abs().amax((1, 2)) > 0
        assert touched.tolist() == [count > 0 for count in counts]


def test_a_whole_model_trains_when_every_token_goes_to_one_expert() -> None:
    args = moe(top_k=1, renormalise=False)
    model = decoder(args)
    with torch.no_grad():
        for _, block in model.blocks():
            block.ffn_norm.weight.fill_(0.0)  # all logits equal: ties go the same way for every token
    out = model(tokens(args))
    out.out.square().mean().backward()
    for stats in out.routing.values():
        assert sorted(stats.tokens_per_expert.tolist()) == [0] * 7 + [24]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_repeat_bit_for_bit() -> None:
    def gradients() -> list[Tensor]:
        model = decoder(MOE)
        model(tokens(MOE, 4, 64)).out.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_a_bf16_model_routes_in_fp32_and_stays_finite() -> None:
    args = moe(bias_update_rate=1e-3, z_coefficient=1e-3, balance_loss=BalanceLoss.SEQUENCE)
    model = decoder(args, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(tokens(args, 4, 32))
    assert out.out.dtype == torch.bfloat16
    for index, router in model.routers().items():
        assert router.expert_bias is not None
        assert router.expert_bias.dtype == torch.float32
        assert out.routing[index].score_sums.dtype == torch.float32
    loss = F.cross_entropy(out.out.float().flatten(0, 1), tokens(args, 4, 32).flatten())
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_routing_of_a_bf16_token_is_that_of_its_value_in_fp32() -> None:
    router = layer(MOE, 0, torch.bfloat16).router
    x = torch.randn(1, 64, MOE.width, generator=torch.Generator().manual_seed(8)).bfloat16()
    routed = router(x)
    scores = (x[0].float() @ router.weight.float().T).softmax(-1)
    assert routed.weights.dtype == torch.float32
    top = scores.topk(2).values
    torch.testing.assert_close(routed.weights, top / top.sum(-1, keepdim=True))


def test_autocast_leaves_the_router_in_fp32() -> None:
    router = layer(MOE, 0, torch.float32).router
    x = torch.randn(1, 64, MOE.width, generator=torch.Generator().manual_seed(8))
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.weights, cast.weights)


def test_the_bias_changes_who_is_chosen_and_not_the_weights() -> None:
    args = moe(bias_update_rate=1e-3, renormalise=False)
    router = layer(args, 0, torch.float64).router
    assert router.expert_bias is not None
    router.expert_bias[3] = 10.0
    x = torch.randn(1, 6, args.width, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    routed = router(x)
    assert (routed.experts == 3).any(-1).all()
    scores = (x[0] @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routed.weights, scores.gather(1, routed.experts))


def test_shared_experts_see_every_token_whatever_the_router_does() -> None:
    assert MOE.moe is not None
    args = replace(MOE, moe=replace(MOE.moe, shared_experts=2))
    module = layer(args, 0, torch.float64)
    assert module.shared is not None
    assert module.shared.down.weight.shape == (32, 48)
    with torch.no_grad():
        module.experts.down.zero_()
        x = torch.randn(1, 3, args.width, dtype=torch.float64)
        torch.testing.assert_close(module(x)[0], module.shared(x))
