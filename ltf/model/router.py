"""Which experts a token goes to, and the statistics that keep their load even."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltf.model.args import BalanceLoss, MoEArgs, ScoreFunction


class RoutingStats(NamedTuple):
    """What one layer's router did with one micro-batch of `rows` sequences and `tokens` tokens in all.

    Every field is a sum, so micro-batches and ranks add up. The three fp32 fields carry gradients.
    """

    tokens_per_expert: Tensor
    """(experts,) int64: assignments, `top_k` of them a token."""
    score_sums: Tensor
    """(experts,): over tokens, the scores after each token's are made to sum to one."""
    row_balance_sum: Tensor
    """Scalar: over rows, the row's own balance loss (1 when even). 0 unless the loss is by sequence."""
    z_sum: Tensor
    """Scalar: over tokens, the squared log-sum-exp of the logits."""
    tokens: int
    rows: int


class Routing(NamedTuple):
    """experts (tokens, top_k) int64 and weights (tokens, top_k) in at least fp32."""

    experts: Tensor
    weights: Tensor
    stats: RoutingStats


class Router(nn.Module):
    """Scores in at least fp32 whatever the dtype of parameters and input, also under autocast."""

    expert_bias: Tensor | None

    def __init__(self, width: int, moe: MoEArgs, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.score = moe.score
        self.renormalise = moe.renormalise
        self.route_scale = moe.route_scale
        self.by_row = moe.balance_loss is BalanceLoss.SEQUENCE
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        bias = torch.zeros(moe.experts, dtype=torch.float32) if moe.bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> Routing:
        """x (batch, sequence, width)."""
        batch, length, width = x.shape
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.reshape(-1, width).to(precise), self.weight.to(precise))
            scores, shares = _scores(logits, self.score)
            # The bias decides who is chosen and never how much the chosen count, so it needs no gradient.
            wanted = scores if self.expert_bias is None else scores.detach() + self.expert_bias
            experts = wanted.topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, experts)
            if self.renormalise:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(precise).tiny)
            if self.route_scale != 1.0:
                weights = weights * self.route_scale
            stats = self._stats(logits, shares, experts, batch, length)
        return Routing(experts, weights, stats)

    def _stats(
        self, logits: Tensor, shares: Tensor, experts: Tensor, batch: int, length: int
    ) -> RoutingStats:
        chosen = experts.view(batch, length * self.top_k)
        row_counts = torch.zeros(batch, shares.shape[-1], dtype=torch.int64, device=shares.device)
        row_counts.scatter_add_(1, chosen, torch.ones_like(chosen))
        row_shares = shares.view(batch, length, -1).sum(1)
        row_balance = shares.new_zeros(())
        if self.by_row:
            row_balance = balance(row_counts, row_shares).sum()
        z_sum = logits.logsumexp(-1).square().sum()
        return RoutingStats(row_counts.sum(0), row_shares.sum(0), row_balance, z_sum, batch * length, batch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moving or casting the model leaves the bias fp32: bf16 would round its small steps away."""
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            device = self.expert_bias.device
            self.expert_bias = torch.empty_like(bias, device=device) if bias.is_meta else bias.to(device)
        return self


def balance(counts: Tensor, score_sums: Tensor) -> Tensor:
    """experts * sum(f * P) (arXiv 2101.03961, eq. 4): 1 for an even load, `experts` at worst.

    Over the last dimension, f is an expert's share of the assignments, P of the scores; only P has a
    gradient.
    """
    f = counts / counts.sum(-1, keepdim=True)
    p = score_sums / score_sums.sum(-1, keepdim=True).detach()
    return counts.shape[-1] * (f.to(p.dtype) * p).sum(-1)


def _scores(logits: Tensor, function: ScoreFunction) -> tuple[Tensor, Tensor]:
    """Scores, and the same scaled so that a token's scores over all experts sum to one."""
    match function:
        case ScoreFunction.SOFTMAX:
            scores = logits.softmax(-1)
            return scores, scores
        case ScoreFunction.SIGMOID:
            scores = logits.sigmoid()
            return scores, scores / scores.sum(-1, keepdim=True)
