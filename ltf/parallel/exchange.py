"""Tokens go to the ranks that hold their experts, and the results come back: flat all-to-all.

Of the E experts of a layer, rank i of a group of R holds E/R consecutive ones, beginning with i * E/R. Where
some ranks are far apart, `ltf.parallel.topology` sends fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ltf.model.experts import Experts
from ltf.model.moe import combine, gather_copies, local_exchange
from ltf.model.router import Routing

Elsewhere = Callable[[], AbstractContextManager[Any]]
"""Makes what is entered around whatever waits for other ranks, so that a stopwatch of own work can pause."""


class FlatExchange:
    """Every (token, expert) pair is a row of its own on the way there and on the way back.

    Forward: three collectives (counts, rows, results) and one wait of the host, for the sizes that the second
    and third need. Backward: two collectives, no wait. Results and gradients repeat bit for bit: an expert
    sees its rows by source rank, then token, then choice.

    All ranks of the group call it for the same layers in the same order, with or without tokens.
    """

    def __init__(self, group: dist.ProcessGroup, elsewhere: Elsewhere = nullcontext) -> None:
        self.wire = Wire(group, elsewhere)

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if self.wire.size == 1:
            return local_exchange(x, routing, experts)
        arrived = _flat_forth(self.wire, x, routing)
        # Also without rows: hooks that gather and free the experts' parameters hang on this call.
        out = experts(arrived.rows, arrived.counts)
        summed: Tensor = _flat_back(self.wire, out, arrived, routing.weights)
        return summed


@dataclass(frozen=True)
class Wire:
    """All-to-all among the ranks of `group`."""

    group: dist.ProcessGroup
    elsewhere: Elsewhere = nullcontext

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def move(self, x: Tensor, incoming: Sequence[int], outgoing: Sequence[int]) -> Tensor:
        """The first outgoing[0] rows of x go to rank 0 and so on; returns the incoming ones by source.

        Without a gradient.
        """
        moved = x.new_empty((sum(incoming), *x.shape[1:]))
        with self.elsewhere():
            dist.all_to_all_single(moved, x.contiguous(), list(incoming), list(outgoing), group=self.group)
        return moved

    def move_rows(self, x: Tensor, incoming: Sequence[int], outgoing: Sequence[int]) -> Tensor:
        """`move`, whose backward pass moves gradients the other way."""
        moved: Tensor = _Move.apply(x, self, incoming, outgoing)  # type: ignore[no-untyped-call]
        return moved

    def trade(self, counts: Tensor) -> Tensor:
        """counts (ranks, n): row i goes to rank i; what comes from rank i is row i of the result."""
        received = torch.empty_like(counts)
        with self.elsewhere():
            dist.all_to_all_single(received, counts.contiguous(), group=self.group)
        return received

    def on_host(self, *counts: Tensor) -> list[list[int]]:
        """Tensors of equal shape as lists, in one copy: the host waits for all that the device has queued."""
        with self.elsewhere():
            values: list[list[int]] = torch.stack(counts).tolist()
        return values


class _Move(torch.autograd.Function):
    """Not torch's functional all_to_all_single_autograd: nothing can be entered around that one's backward.

    The collectives are synchronous, which for NCCL means that the current stream waits and the host does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, incoming: Sequence[int], outgoing: Sequence[int]) -> Tensor:
        ctx.wire, ctx.incoming, ctx.outgoing = wire, incoming, outgoing
        return wire.move(x, incoming, outgoing)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.wire.move(gradients[0], ctx.outgoing, ctx.incoming), None, None, None


class _Arrived(NamedTuple):
    """Rows by local expert, and what brings them back."""

    rows: Tensor
    counts: Tensor
    by_expert: Tensor
    by_source: Tensor
    order: Tensor
    inverse: Tensor
    incoming: list[int]
    outgoing: list[int]


# What follows moves memory and reads sizes: torch.compile could fuse little of it and would have to compile
# it again for each new size. The experts between the two are compiled.
def _forth(wire: Wire, x: Tensor, routing: Routing) -> _Arrived:
    per_expert = routing.stats.tokens_per_expert
    local = experts_a_rank(per_expert.numel(), wire.size)
    received = wire.trade(per_expert.view(wire.size, local))
    outgoing, incoming = wire.on_host(per_expert.view(wire.size, local).sum(1), received.sum(1))
    order, inverse = sorting(routing.experts.reshape(-1))
    rows = wire.move_rows(gather_copies(x, order, inverse, routing.experts.shape[1]), incoming, outgoing)
    expert = torch.arange(local, device=x.device).repeat(wire.size)
    by_expert, by_source = sorting(expert.repeat_interleave(received.view(-1), output_size=sum(incoming)))
    rows = gather_copies(rows, by_expert, by_source, 1)
    return _Arrived(rows, received.sum(0), by_expert, by_source, order, inverse, incoming, outgoing)


def _back(wire: Wire, out: Tensor, arrived: _Arrived, weights: Tensor) -> Tensor:
    by_source = gather_copies(out, arrived.by_source, arrived.by_expert, 1)
    returned = wire.move_rows(by_source, arrived.outgoing, arrived.incoming)
    return combine(gather_copies(returned, arrived.inverse, arrived.order, 1), weights)


_flat_forth = torch.compiler.disable(_forth)  # type: ignore[no-untyped-call]
_flat_back = torch.compiler.disable(_back)  # type: ignore[no-untyped-call]


def experts_a_rank(experts: int, ranks: int) -> int:
    if experts % ranks:
        raise ValueError(f"{experts} experts cannot be divided evenly among {ranks} ranks")
    return experts // ranks


def sorting(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The stable permutation that sorts `keys` (n,), and its inverse."""
    order = keys.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return order, inverse
