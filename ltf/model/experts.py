"""The experts of one layer: stacked SwiGLUs, each run on its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ltf.model.mlp import gated

GROUPED_DTYPES = (torch.float32, torch.bfloat16)
_loops = False


class Experts(nn.Module):
    """`count` SwiGLUs in two parameters whose first dimension is the expert, so that they shard by expert.

    `gate_up` (count, 2 * hidden, width) holds each gate's rows, then each up projection's; `down` (count,
    width, hidden).
    """

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(count, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(count, width, hidden))

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """x (rows, width) sorted by expert; tokens_per_expert (count,) sums to rows and may hold zeros.

        With expert parallelism the parameters are DTensors, and `count` is that of the experts held here.
        """
        hidden = gated(grouped_linear(x, _held(self.gate_up), tokens_per_expert))
        return grouped_linear(hidden, _held(self.down), tokens_per_expert)


def _held(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x (rows, in), `counts[i]` at a time, times weight[i] (out, in) transposed.

    One kernel where torch has it for the dtype and shape, otherwise a loop.
    """
    if not can_group(x, weight):
        pieces = zip(torch.split(x, counts.tolist()), weight.unbind(), strict=True)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in pieces])
    # torch.compile's shape rule for the kernel knows bf16 alone: other dtypes run it outside of the graph.
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        out: Tensor = _kernel_untraced(x, weight, counts)
        return out
    return _kernel(x, weight, counts)


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm takes these.

    It has no fp64, wants strides of whole 16 bytes, and its backward pass fails where there are no rows.
    """
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    same = x.dtype == weight.dtype and x.dtype in GROUPED_DTYPES
    fits = not _loops and aligned and same and x.shape[0] > 0
    # Inside a graph there is nothing to try; where it is compiled, the kernel's own message must do.
    return fits and (torch.compiler.is_compiling() or _has_kernel(x.device.type, x.dtype))


@cache
def _has_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether torch has grouped_mm for that kind of device at all."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        with torch.no_grad():
            x, weight = (torch.zeros(shape, device=device, dtype=dtype) for shape in ((8, 8), (1, 8, 8)))
            F.grouped_mm(x, weight, offs=torch.tensor([8], device=device, dtype=torch.int32))
    except RuntimeError:
        return False
    return True


@contextmanager
def looped() -> Iterator[None]:
    """In here every process' experts run one after the other, also where torch has one kernel for all."""
    global _loops  # noqa: PLW0603 - as torch's own choices of kernels are
    before, _loops = _loops, True
    try:
        yield
    finally:
        _loops = before


def _kernel(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    return _dense_gradient(F.grouped_mm(x, weight.transpose(-2, -1), offs=ends))


_kernel_untraced = torch.compiler.disable(_kernel)  # type: ignore[no-untyped-call]


def _dense_gradient(x: Tensor) -> Tensor:
    same: Tensor = _DenseGradient.apply(x)  # type: ignore[no-untyped-call]
    return same


class _DenseGradient(torch.autograd.Function):
    """The identity. grouped_mm's backward refuses gradients with stride 0, such as those of a plain sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()
