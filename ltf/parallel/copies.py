"""Rows copied to several places, and summed again: each the other's backward pass.

Nothing here adds in an order that changes from run to run, as index_add and scatter_add do on accelerators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Copies(NamedTuple):
    """Which row each copy is of, and the copies of each row."""

    source: Tensor
    """(copies,): the row of each."""
    order: Tensor
    """(copies,): the copies sorted by row."""
    starts: Tensor
    """(rows,): where the copies of each row begin in `order`."""

    @classmethod
    def of(cls, source: Tensor, rows: int) -> Copies:
        order = source.argsort(stable=True)
        return cls(source, order, run_starts(source[order], rows))


def run_starts(sorted_keys: Tensor, keys: int) -> Tensor:
    """(keys,): the index of the first entry that is not below each of 0..keys-1."""
    return torch.searchsorted(sorted_keys.contiguous(), torch.arange(keys, device=sorted_keys.device))


def spread(x: Tensor, copies: Copies) -> Tensor:
    """x (rows, width) -> (copies, width)."""
    made: Tensor = _Spread.apply(x, copies)  # type: ignore[no-untyped-call]
    return made


def gather(values: Tensor, copies: Copies) -> Tensor:
    """values (copies, width) -> (rows, width): the sum over each row's copies; none sum to zero."""
    summed: Tensor = _Gather.apply(values, copies)  # type: ignore[no-untyped-call]
    return summed


def gather_weighted(values: Tensor, copies: Copies, weights: Tensor) -> Tensor:
    """`gather` of weight times value; weights (copies,) lie in the order of `copies.order`.

    Like `ltf.model.moe.combine`, multiplies in the dtype of `values`; sums are kept in fp32 or more.
    """
    weights = weights.to(values.dtype)
    summed: Tensor = _GatherWeighted.apply(values, weights, copies)  # type: ignore[no-untyped-call]
    return summed


def _sums(values: Tensor, copies: Copies, weights: Tensor | None = None) -> Tensor:
    rows = copies.starts.numel()
    if rows == 0 or values.shape[0] == 0:
        return values.new_zeros((rows, values.shape[1]))
    # A bag is a run of rows summed one after the other in wide accumulators, without a copy of them all.
    return F.embedding_bag(
        copies.order, values.contiguous(), copies.starts, mode="sum", per_sample_weights=weights
    )


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(*copies)
        return x.index_select(0, copies.source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sums(gradients[0], Copies(*ctx.saved_tensors)), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(copies.source)
        return _sums(values, copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        return gradients[0].index_select(0, source), None


class _GatherWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(values, weights, copies.source, copies.order)
        return _sums(values, copies, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, weights, source, order = ctx.saved_tensors
        by_copy = torch.empty_like(weights).scatter_(0, order, weights)
        gradient = gradients[0].index_select(0, source)
        of_weights = torch.bmm(values.unsqueeze(1), gradient.unsqueeze(2)).view(-1).index_select(0, order)
        return gradient * by_copy.unsqueeze(1), of_weights, None
