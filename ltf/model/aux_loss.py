"""Losses and bias steps that keep routers even over a batch of many micro-batches on many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltf.model.args import BalanceLoss, MoEArgs
from ltf.model.router import Router, RoutingStats, balance


class RouterLosses(NamedTuple):
    """`total`, coefficients applied and layers summed, carries the gradient; the others are layer means."""

    total: Tensor
    balance: Tensor
    z: Tensor


def router_losses(
    routing: Mapping[int, RoutingStats],
    moe: MoEArgs,
    *,
    batch_counts: Mapping[int, Tensor] | None = None,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
) -> RouterLosses:
    """This micro-batch's share of the whole batch's router losses; shares add up to the batch's loss.

    `batch_tokens`, `batch_rows`: tokens and sequences of the whole batch over all micro-batches and ranks;
    absent: this micro-batch is the batch. `batch_counts`: for the batch loss, each layer's assignments over
    the whole batch. They carry no gradient. A caller that cannot know them before the backward pass gives the
    sum of what was seen so far, this micro-batch included (`add_counts`, all-reduced over ranks): with the
    last micro-batch it is exact.
    """
    if not routing:
        raise ValueError("no layer has a router: there is no router loss")
    balances, zs = [], []
    for layer, stats in routing.items():
        tokens = stats.tokens if batch_tokens is None else batch_tokens
        rows = stats.rows if batch_rows is None else batch_rows
        zs.append(stats.z_sum / tokens)
        match moe.balance_loss:
            case BalanceLoss.BATCH:
                counts = stats.tokens_per_expert if batch_counts is None else batch_counts[layer]
                balances.append(balance(counts, stats.score_sums) * (stats.tokens / tokens))
            case BalanceLoss.SEQUENCE:
                balances.append(stats.row_balance_sum / rows)
            case BalanceLoss.NONE:
                balances.append(torch.zeros_like(stats.z_sum))
    balance_sum, z_sum = torch.stack(balances).sum(), torch.stack(zs).sum()
    total = moe.balance_coefficient * balance_sum + moe.z_coefficient * z_sum
    return RouterLosses(total, balance_sum.detach() / len(routing), z_sum.detach() / len(routing))


def add_counts(counts: Mapping[int, Tensor], routing: Mapping[int, RoutingStats]) -> dict[int, Tensor]:
    """Each layer's assignments so far plus those of one more micro-batch."""
    return {
        layer: stats.tokens_per_expert + counts[layer] if layer in counts else stats.tokens_per_expert
        for layer, stats in routing.items()
    }


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` unchanged; its backward pass also sends gradient 1 into `loss`.

    For a pipeline stage that has router losses but not the model's loss. Use it once on what the stage hands
    on.
    """
    attached: Tensor = _Attached.apply(hidden, loss)  # type: ignore[no-untyped-call]
    return attached


def bias_step(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """The bias after one optimizer step: up where an expert had less than the mean, down where more.

    arXiv 2408.15664, algorithm 1; the mean step is taken out, which changes no choice and keeps the bias from
    drifting. `tokens_per_expert` is over the whole batch, all ranks.
    """
    load = tokens_per_expert.to(bias.dtype)
    step = (load.mean() - load).sign()
    return bias + rate * (step - step.mean())


@torch.no_grad()
def update_biases(routers: Mapping[int, Router], counts: Mapping[int, Tensor], rate: float) -> None:
    """Take `bias_step` in place for every layer's router; once an optimizer step, with the batch's counts."""
    for layer, router in routers.items():
        if router.expert_bias is None:
            raise ValueError(
                f"layer {layer}'s router has no bias: moe.bias_update_rate was 0 when it was made"
            )
        router.expert_bias.copy_(bias_step(router.expert_bias, counts[layer], rate))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)
