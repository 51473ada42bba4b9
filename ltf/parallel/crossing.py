"""What an exchange of tokens puts on the link between nodes, in rows and in bytes.

A row that crosses in the forward pass comes back as a result; in the backward pass the result's gradient
crosses, and the row's comes back: four crossings. Flat, a row is a (token, expert) pair whose expert is on
another node. Topology-aware, it is a (token, other node) pair, however many of the node's experts the token
goes to; each (token, expert) pair adds its id and weight, and its weight's gradient.

For a token of node s, k of E experts drawn evenly, E_n of them on node n:
    flat      k * (E - E_s) / E
    topology  sum over n != s of 1 - C(E - E_n, k) / C(E, k)
Two equal nodes give k/2 and nearly 1: the saving approaches k/2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from ltf.parallel.exchange import experts_a_rank

ID_BYTES = 4


@dataclass(frozen=True)
class Crossing:
    """Rows bound for other nodes in one forward pass of one layer, one way."""

    flat: float
    topology: float

    def __add__(self, other: Crossing) -> Crossing:
        return Crossing(self.flat + other.flat, self.topology + other.topology)


def expected_rows(experts: int, top_k: int, nodes: Sequence[int], tokens: int) -> Crossing:
    """Over all ranks of a group, each with `tokens` tokens; nodes[i] is the node of rank i. Even routing."""
    local = experts_a_rank(experts, len(nodes))
    if not 1 <= top_k <= experts:
        raise ValueError(f"a token cannot go to {top_k} of {experts} experts")
    ranks = Counter(nodes)
    reached = {
        node: 1 - comb(experts - count * local, top_k) / comb(experts, top_k) for node, count in ranks.items()
    }
    flat = sum(count * top_k * (experts - count * local) / experts for count in ranks.values())
    topology = sum(
        count * sum(share for other, share in reached.items() if other != node)
        for node, count in ranks.items()
    )
    return Crossing(tokens * flat, tokens * topology)


def rows_of(chosen: Tensor, experts: int, nodes: Sequence[int], rank: int) -> Crossing:
    """What rank `rank` of the group sends if its tokens chose these: chosen (tokens, top_k) of `experts`."""
    node_of = torch.tensor(nodes).repeat_interleave(experts_a_rank(experts, len(nodes)))
    bound = node_of[chosen.cpu()]
    away = bound != nodes[rank]
    others = [node for node in set(nodes) if node != nodes[rank]]
    return Crossing(int(away.sum()), sum(int((bound == node).any(1).sum()) for node in others))


@dataclass(frozen=True)
class LinkBytes:
    """Payload of a forward and a backward pass of one layer, both ways."""

    flat: float
    topology: float


def link_bytes(rows: Crossing, width: int, element_bytes: int, *, weight_bytes: int = 4) -> LinkBytes:
    """Rows of `width` elements of so many bytes. Recomputation adds half of the rows'.

    Not counted: the sizes, from each rank 8 bytes an expert (flat) or 16 a rank (topology), and the network's
    headers.
    """
    row = 4 * width * element_bytes
    return LinkBytes(rows.flat * row, rows.topology * row + rows.flat * (ID_BYTES + 2 * weight_bytes))
