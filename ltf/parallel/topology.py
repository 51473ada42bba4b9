"""Token exchange that uses the slow link between nodes once a token and node.

A token bound for several experts goes to each node that has some of them once, and from there to the ranks of
that node that have them, to each once. On the way back each rank weights and sums what its experts made, the
node sums that, and one row a (token, node) returns. `ltf.parallel.crossing` says what that saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ltf.model.experts import Experts
from ltf.model.moe import gather_copies
from ltf.model.router import Routing
from ltf.parallel.copies import Copies, gather, gather_weighted, run_starts, spread
from ltf.parallel.exchange import Elsewhere, FlatExchange, Wire, experts_a_rank, sorting


def node_map(names: Sequence[str]) -> list[int]:
    """Ranks' node names -> node numbers, counted from 0 in order of appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


class TopologyExchange:
    """`nodes[i]` is the node of rank i of `group`; nodes may have unequal numbers of ranks.

    With one node, or one expert a token, there is nothing to save and the exchange is flat.

    Across, a token travels between ranks of equal place in their nodes, so that all network interfaces are
    used; where the numbers of ranks differ, see `Places.relays`. The id and fp32 weight of each of a token's
    experts, 8 bytes together, travel with it to where they are needed and no further.

    Forward: four collectives across (counts, rows, ids with weights, results), four inside the node, and two
    waits of the host for sizes, one each. Backward: three and three, no wait. A node of one rank has none
    inside. Results and gradients repeat bit for bit.

    Makes a process group of the node's own ranks: make one exchange for all layers, on all ranks of the run
    at the same point.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        nodes: Sequence[int],
        elsewhere: Elsewhere = nullcontext,
        *,
        inside: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """`inside`: a group of this node's ranks in the order of `group`, if there is one already.
        `timeout`: of collectives inside the node; torch's default if none.
        """
        if len(nodes) != group.size():
            raise ValueError(f"{len(nodes)} nodes are named for the {group.size()} ranks of the group")
        self.places = Places(nodes)
        self.across = Wire(group, elsewhere)
        self.flat = FlatExchange(group, elsewhere)
        members = self.places.members[self.places.node[group.rank()]]
        # Only the members call new_group, which names the group after them and the number of groups that the
        # process has: so every rank makes one, needed or not, and the numbers stay equal everywhere.
        if inside is None:
            inside = dist.new_group(
                [dist.get_global_rank(group, member) for member in members],
                backend=dist.get_backend(group),
                timeout=timeout,
                use_local_synchronization=True,
            )
        self.inside = Wire(inside, elsewhere) if len(members) > 1 else None

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if self.places.nodes == 1 or routing.experts.shape[1] == 1:
            return self.flat(x, routing, experts)
        arrived = _topology_forth(self, x, routing)
        # Also without rows: hooks that gather and free the experts' parameters hang on this call.
        out = experts(arrived.rows, arrived.counts)
        summed: Tensor = _topology_back(self, out, arrived)
        return summed


class Tables(NamedTuple):
    """Each expert's node and its rank's place there; each node's ranks, padded, and their number."""

    node: Tensor
    place: Tensor
    ranks: Tensor
    sizes: Tensor


class Places:
    """Who is where. Ranks are the group's, nodes are numbered as they appear, places count inside a node."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.node = node_map([str(node) for node in nodes])
        self.nodes = len(set(self.node))
        self.members = [[r for r, n in enumerate(self.node) if n == node] for node in range(self.nodes)]
        self.place = [self.members[node].index(rank) for rank, node in enumerate(self.node)]
        self._tables: dict[tuple[torch.device, int], Tables] = {}

    def on(self, device: torch.device, local: int) -> Tables:
        """For ranks of `local` experts each."""
        if (device, local) not in self._tables:
            widest = max(map(len, self.members))
            padded = [ranks + ranks[:1] * (widest - len(ranks)) for ranks in self.members]
            self._tables[device, local] = Tables(
                torch.tensor(self.node, device=device).repeat_interleave(local),
                torch.tensor(self.place, device=device).repeat_interleave(local),
                torch.tensor(padded, device=device),
                torch.tensor([len(ranks) for ranks in self.members], device=device),
            )
        return self._tables[device, local]

    def relays(self, rank: int, tokens: int, tables: Tables) -> Tensor:
        """(tokens, nodes): the rank of each node that takes each of this rank's tokens in.

        The tokens of a node's ranks, laid end to end, are cut into as many equal parts as the other node has
        ranks: equal nodes pair equal places, and a token for the own node stays where it is.
        """
        own = len(self.members[self.node[rank]])
        at = self.place[rank] * tokens + torch.arange(tokens, device=tables.ranks.device)
        part = at.unsqueeze(1) * tables.sizes // max(own * tokens, 1)
        return tables.ranks.unsqueeze(0).expand(tokens, -1, -1).gather(2, part.unsqueeze(2)).squeeze(2)


class Pairs(NamedTuple):
    """Which expert takes which row and with what weight, sorted by row; every row has at least one."""

    row: Tensor
    """(pairs,)"""
    expert: Tensor
    """(pairs,) of the layer's."""
    weight: Tensor
    """(pairs,) fp32 or wider."""


class Hop(NamedTuple):
    """What the way back needs to know of the way there."""

    copies: Copies
    incoming: list[int]
    outgoing: list[int]


def there(wire: Wire, x: Tensor, pairs: Pairs, destination: Tensor) -> tuple[Tensor, Pairs, Hop]:
    """Sends pairs to their `destination` (pairs,), ranks of `wire`, and a row once for all of its pairs."""
    order, inverse = sorting(destination * x.shape[0] + pairs.row)
    row, to = pairs.row[order], destination[order]
    first = torch.ones_like(row)
    first[1:] = (row[1:] != row[:-1]) | (to[1:] != to[:-1])
    copy = first.cumsum(0)  # copies up to and including the pair's own
    ends = torch.searchsorted(to, torch.arange(wire.size, device=x.device), right=True)
    counts = torch.stack((torch.cat((copy.new_zeros(1), copy))[ends], ends), 1)
    counts = counts.diff(dim=0, prepend=torch.zeros_like(counts[:1]))
    sent, received = wire.on_host(counts, wire.trade(counts))
    (rows_out, pairs_out), (rows_in, pairs_in) = (list(zip(*each, strict=True)) for each in (sent, received))
    first_pairs = torch.searchsorted(copy, torch.arange(1, sum(rows_out) + 1, device=x.device))
    copies = Copies.of(row[first_pairs], x.shape[0])
    weight = gather_copies(pairs.weight.unsqueeze(1), order, inverse, 1).squeeze(1)
    rows, weight, tag = send(
        wire,
        Load(spread(x, copies), weight, (pairs.expert[order] * 2 + first).to(torch.int32)),
        Sizes(list(rows_in), list(rows_out), list(pairs_in), list(pairs_out)),
    )
    arrived = Pairs((tag % 2).cumsum(0) - 1, (tag // 2).long(), weight)
    return rows, arrived, Hop(copies, list(rows_in), list(rows_out))


def back(wire: Wire, out: Tensor, hop: Hop) -> Tensor:
    """The sum of what comes back for each row that went."""
    return gather(wire.move_rows(out, hop.outgoing, hop.incoming), hop.copies)


class Load(NamedTuple):
    rows: Tensor
    weight: Tensor
    """(pairs,)"""
    tag: Tensor
    """(pairs,) int32: twice the expert, plus one for the first pair of a row."""


class Sizes(NamedTuple):
    rows_in: list[int]
    rows_out: list[int]
    pairs_in: list[int]
    pairs_out: list[int]


def send(wire: Wire, load: Load, sizes: Sizes) -> Load:
    """Moves rows and pairs; the gradients of rows and weights come back, in that order on every rank."""
    return Load(*_Send.apply(*load, wire, sizes))  # type: ignore[no-untyped-call]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, tag: Tensor, wire: Wire, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.wire, ctx.sizes = wire, sizes
        moved = wire.move(rows, sizes.rows_in, sizes.rows_out)
        width = weight.element_size()
        packed = torch.cat(
            [part.contiguous().view(torch.uint8).view(-1, part.element_size()) for part in (weight, tag)], 1
        )
        packed = wire.move(packed, sizes.pairs_in, sizes.pairs_out)
        moved_weight = packed[:, :width].reshape(-1).view(weight.dtype)
        moved_tag = packed[:, width:].reshape(-1).view(tag.dtype)
        ctx.mark_non_differentiable(moved_tag)
        return moved, moved_weight, moved_tag

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        wire: Wire = ctx.wire
        sizes: Sizes = ctx.sizes
        rows = wire.move(gradients[0], sizes.rows_out, sizes.rows_in)
        weight = wire.move(gradients[1], sizes.pairs_out, sizes.pairs_in)
        return rows, weight, None, None, None


class _Arrived(NamedTuple):
    """Rows by local expert, and what brings them back."""

    rows: Tensor
    counts: Tensor
    copies: Copies
    weight: Tensor
    across: Hop
    inside: Hop | None


def _forth(exchange: TopologyExchange, x: Tensor, routing: Routing) -> _Arrived:
    places, across, inside = exchange.places, exchange.across, exchange.inside
    local = experts_a_rank(routing.stats.tokens_per_expert.numel(), across.size)
    tables = places.on(x.device, local)
    tokens, top_k = routing.experts.shape
    row = torch.arange(tokens * top_k, device=x.device) // top_k
    pairs = Pairs(row, routing.experts.reshape(-1), routing.weights.reshape(-1))
    relays = places.relays(across.rank, tokens, tables)
    rows, pairs, out = there(across, x, pairs, relays[row, tables.node[pairs.expert]])
    spread_inside = None
    if inside is not None:
        rows, pairs, spread_inside = there(inside, rows, pairs, tables.place[pairs.expert])
    expert = pairs.expert - across.rank * local
    by_expert, by_row = sorting(expert)
    counts = torch.searchsorted(expert[by_expert], torch.arange(local, device=x.device), right=True).diff(
        prepend=expert.new_zeros(1)
    )
    copies = Copies(pairs.row[by_expert], by_row, run_starts(pairs.row, rows.shape[0]))
    return _Arrived(spread(rows, copies), counts, copies, pairs.weight, out, spread_inside)


def _back(exchange: TopologyExchange, out: Tensor, arrived: _Arrived) -> Tensor:
    rows = gather_weighted(out, arrived.copies, arrived.weight)
    if exchange.inside is not None and arrived.inside is not None:
        rows = back(exchange.inside, rows, arrived.inside)
    return back(exchange.across, rows, arrived.across)


# As for the flat exchange: sizes are read here, and only the experts between the two are worth compiling.
_topology_forth = torch.compiler.disable(_forth)  # type: ignore[no-untyped-call]
_topology_back = torch.compiler.disable(_back)  # type: ignore[no-untyped-call]
