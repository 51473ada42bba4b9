from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ltf.model.args import BalanceLoss, MoEArgs, ScoreFunction
from ltf.model.aux_loss import add_counts, attach_loss, bias_step, router_losses, update_biases
from ltf.model.router import Router, RoutingStats
from tests.ltf.model.shapes import decoder, moe, tokens

THREE = [[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]


def routed(logits: list[list[list[float]]], **changes: object) -> tuple[RoutingStats, MoEArgs]:
    """What a router with three experts does when its logits (rows, tokens, experts) are these."""
    fields = {"experts": 3, "top_k": 1, "expert_width": 8, "renormalise": False} | changes
    args = MoEArgs(**fields)  # type: ignore[arg-type]
    router = Router(3, args, 1).double()
    torch.nn.init.eye_(router.weight)
    return router(torch.tensor(logits, dtype=torch.float64)).stats, args


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def test_the_batch_loss_is_experts_times_load_share_times_score_share() -> None:
    stats, args = routed([THREE], balance_coefficient=0.5)
    shares = [softmax(row) for row in THREE]
    mean = [sum(s[e] for s in shares) / 4 for e in range(3)]
    expected = 3 * (2 / 4 * mean[0] + 1 / 4 * mean[1] + 1 / 4 * mean[2])
    losses = router_losses({0: stats}, args)
    assert stats.tokens_per_expert.tolist() == [2, 1, 1]
    assert losses.balance.item() == pytest.approx(expected, rel=1e-12)
    assert losses.total.item() == pytest.approx(0.5 * expected, rel=1e-12)


def test_the_sequence_loss_is_the_mean_of_each_rows_own_loss() -> None:
    stats, args = routed([THREE[:2], THREE[2:]], balance_loss=BalanceLoss.SEQUENCE)
    shares = [softmax(row) for row in THREE]
    first = 3 * (shares[0][0] + shares[1][0]) / 2
    second = 3 * ((shares[2][1] + shares[3][1]) / 2 / 2 + (shares[2][2] + shares[3][2]) / 2 / 2)
    assert router_losses({0: stats}, args).balance.item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_the_z_loss_is_the_mean_squared_log_sum_exp() -> None:
    stats, args = routed([THREE], z_coefficient=2.0, balance_loss=BalanceLoss.NONE)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in THREE) / 4
    losses = router_losses({0: stats}, args)
    assert losses.z.item() == pytest.approx(expected, rel=1e-12)
    assert losses.total.item() == pytest.approx(2 * expected, rel=1e-12)
    assert losses.balance.item() == 0


@pytest.mark.parametrize("scope", [BalanceLoss.BATCH, BalanceLoss.SEQUENCE])
def test_an_even_load_costs_one_and_one_expert_for_all_costs_their_number(scope: BalanceLoss) -> None:
    sure = 50.0
    even = [[sure, 0.0, 0.0], [0.0, sure, 0.0], [0.0, 0.0, sure]]
    stats, args = routed([even, even], balance_loss=scope)
    assert router_losses({0: stats}, args).balance.item() == pytest.approx(1)
    stats, args = routed([[even[0]] * 3], balance_loss=scope)
    assert router_losses({0: stats}, args).balance.item() == pytest.approx(3)


@pytest.mark.parametrize("scope", [BalanceLoss.BATCH, BalanceLoss.SEQUENCE])
def test_shares_of_micro_batches_add_up_to_the_whole_batch_in_loss_and_gradient(scope: BalanceLoss) -> None:
    args = moe(balance_loss=scope, balance_coefficient=0.1, z_coefficient=0.01)
    experts = args.moe
    assert experts is not None
    x = tokens(args, batch=6, length=8)

    def gradients(parts: list[Tensor]) -> tuple[float, list[Tensor]]:
        model = decoder(args, dtype=torch.float64)
        counts: dict[int, Tensor] = {}
        for part in parts:
            counts = add_counts(counts, model(part).routing)
        total = 0.0
        for part in parts:
            share = router_losses(
                model(part).routing, experts, batch_counts=counts, batch_tokens=x.numel(), batch_rows=len(x)
            ).total
            torch.autograd.backward(share)
            total += share.item()
        return total, [p.grad for p in model.parameters() if p.grad is not None]

    whole, expected = gradients([x])
    for parts in ([x[:2], x[2:4], x[4:]], [x[:5], x[5:]]):
        loss, found = gradients(parts)
        assert loss == pytest.approx(whole, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_batch_loss_lets_single_sequences_be_uneven() -> None:
    sure = 50.0
    rows = [[[sure if e == row else 0.0 for e in range(3)]] * 4 for row in range(3)]
    stats, args = routed(rows, balance_loss=BalanceLoss.BATCH)
    assert router_losses({0: stats}, args).balance.item() == pytest.approx(1)
    stats, args = routed(rows, balance_loss=BalanceLoss.SEQUENCE)
    assert router_losses({0: stats}, args).balance.item() == pytest.approx(3)


def test_an_attached_loss_sends_the_gradient_of_an_added_one() -> None:
    def gradients(attach: bool) -> list[Tensor]:
        args = moe(balance_coefficient=0.3)
        assert args.moe is not None
        model = decoder(args, dtype=torch.float64)
        out = model(tokens(args))
        extra = router_losses(out.routing, args.moe).total
        loss = attach_loss(out.out, extra).square().mean() if attach else out.out.square().mean() + extra
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-12, atol=1e-15)


def test_a_bias_step_goes_up_for_the_idle_and_down_for_the_busy_and_sums_to_zero() -> None:
    step = bias_step(torch.zeros(4), torch.tensor([10, 4, 1, 1]), 0.01)
    torch.testing.assert_close(step, torch.tensor([-0.01, 0.0, 0.01, 0.01]) - 0.0025)
    assert step.sum().item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("score", list(ScoreFunction))
def test_bias_steps_even_the_load_of_a_skewed_router(score: ScoreFunction) -> None:
    args = MoEArgs(experts=8, top_k=2, expert_width=8, score=score, bias_update_rate=0.003)
    router = Router(16, args, 2)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.1, generator=generator)
    skew = torch.zeros(16)
    skew[0] = 1.0
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(-0.5, 1.0, 8)

    def busiest() -> float:
        """The largest load over the mean."""
        x = torch.randn(8, 64, 16, generator=generator) + skew
        counts = router(x).stats.tokens_per_expert
        update_biases({0: router}, {0: counts}, args.bias_update_rate)
        return float(counts.max() / counts.float().mean())

    before = busiest()
    after = [busiest() for _ in range(150)][-20:]
    assert before > 2
    assert max(after) < 1.35


def test_updating_a_router_without_a_bias_is_an_error() -> None:
    router = Router(4, MoEArgs(experts=4, top_k=2, expert_width=8), 2)
    with pytest.raises(ValueError, match="bias_update_rate"):
        update_biases({3: router}, {3: torch.ones(4)}, 0.1)
