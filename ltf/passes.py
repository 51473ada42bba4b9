"""Forward and backward passes over a rank's micro-batches of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ltf.data.loader import Batch
from ltf.model.args import MoEArgs
from ltf.model.aux_loss import router_losses
from ltf.model.router import RoutingStats


@dataclass(frozen=True)
class Totals:
    """Of the whole batch of a step, over all ranks and micro-batches; every loss is divided by these.

    `loss_tokens`: labels that count. `tokens`, `rows`: all positions and all samples.
    `counts`: each MoE layer's assignments in the batch *before*, on which the batch balance loss rests. Known
    before the first pass begins, they make the loss the same however the batch is split among ranks and
    micro-batches. Where empty, the load is taken as even.
    """

    loss_tokens: int
    tokens: int
    rows: int
    counts: Mapping[int, Tensor]


@dataclass(frozen=True)
class Passed:
    """This rank's share of the step; shares add up over ranks.

    `loss`: of the mean cross-entropy in nats a label. `balance`, `z`: of the router losses, summed over this
    rank's layers, coefficients not applied. `counts`: assignments by layer. All detached, on the device.
    """

    loss: Tensor
    balance: Tensor
    z: Tensor
    counts: Mapping[int, Tensor]


class Passes(Protocol):
    """Leaves reduced gradients in the parameters: those of the mean loss plus the router losses."""

    def __call__(self, batches: Sequence[Batch], totals: Totals) -> Passed:
        """`batches`: this rank's micro-batches, on the device."""
        ...


def cross_entropy_sum(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """logits (batch, sequence, vocabulary) -> the fp32 sum over labels whose mask is 1."""
    kept = torch.where(loss_mask.bool(), labels, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), kept.flatten(), ignore_index=-100, reduction="sum")


def router_share(
    routing: Mapping[int, RoutingStats], moe: MoEArgs, totals: Totals
) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch's share of the batch's router losses: the term to add to the loss, balance sum, z sum."""
    counts = totals.counts or {
        layer: torch.ones_like(stats.tokens_per_expert) for layer, stats in routing.items()
    }
    losses = router_losses(
        routing, moe, batch_counts=counts, batch_tokens=totals.tokens, batch_rows=totals.rows
    )
    return losses.total, losses.balance * len(routing), losses.z * len(routing)
