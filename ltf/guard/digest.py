"""Short digests of tensors' bits, and the record of a step's passes that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltf.guard.point import Point

COLUMNS = 2048
LANES = 64
PART = 2**20
"""Bytes that stay in a core's cache; whole blocks of LANES^2 words."""
_WEIGHTS: dict[torch.device, Tensor] = {}


@torch.no_grad()
def digest(tensor: Tensor, also: Callable[[Tensor], None] | None = None) -> Tensor:
    """An int64 scalar on the tensor's device, the same whatever the order in which the device adds.

    The bytes, eight at a time, are added without carry out of 64 bits in columns; columns are multiplied by
    odd random numbers and added. One flipped bit changes a column by a power of two and so always changes
    the digest, and so does a value that moves to another column. Missed for certain: values that trade places
    within a column, and two changes of a column that cancel exactly, such as the same bit set in one and
    cleared in the other. Any other change is missed with a chance of about 2^-64.

    To read a large tensor as fast as memory gives it, blocks of LANES^2 words are first folded into LANES
    words. A column is then all words LANES * 8 bytes apart in a block, and those of every COLUMNS / LANES-th
    block; of the words at the end that fill no block, those COLUMNS * 8 bytes apart.

    `also`: is shown all of the tensor, in parts that a CPU still has in its cache, so that what it computes
    of them costs no second way through memory.
    """
    data = tensor.detach().contiguous().view(-1)
    words = data.numel() * data.element_size() // 8
    whole = words * 8 // data.element_size()
    total: Tensor | None = None
    shown = 0
    if words:
        head = data[:whole]
        if head.storage_offset() * data.element_size() % 8:
            head = head.clone()
        blocks = words // LANES**2 * LANES**2
        folded = []
        for part in _parts(head, blocks * 8 // data.element_size()):
            if also is not None:
                also(part)
            folded.append(part.view(torch.int64).view(-1, LANES, LANES).sum(1).view(-1))
            shown += part.numel()
        total = _sum(folded, head.view(torch.int64)[blocks:])
    if also is not None and shown < data.numel():
        also(data[shown:])
    if total is None or whole < data.numel():
        tail = data[whole:].clone().view(torch.uint8).to(torch.int64)
        # A multiplier of its own: the last bytes must not look like a first word.
        end = (tail * _weights(data.device)[-8:][: tail.numel()]).sum() * 0x51D7348DA1
        total = end if total is None else total + end
    return total


def digest_all(tensors: Sequence[Tensor], also: Callable[[Tensor], None] | None = None) -> Tensor:
    """Of several tensors in order; `also` as for `digest`."""
    if len(tensors) == 1:
        return digest(tensors[0], also)
    return _columns(torch.stack([digest(tensor, also) for tensor in tensors]))


def _parts(data: Tensor, count: int) -> Sequence[Tensor]:
    """The first `count` elements; a device other than a CPU takes them at once."""
    if not count:
        return ()
    head = data[:count]
    return torch.split(head, PART // data.element_size()) if data.device.type == "cpu" else (head,)


def _sum(folded: Sequence[Tensor], rest: Tensor) -> Tensor:
    if not folded:
        return _columns(rest)
    total = _columns(torch.cat(list(folded)) if len(folded) > 1 else folded[0])
    # A multiplier of its own: what stands behind the blocks must not look like their sums.
    return total + _columns(rest) * 0x3C6EF372FB if rest.numel() else total


def _columns(words: Tensor) -> Tensor:
    weights = _weights(words.device)
    rows = words.numel() // COLUMNS
    rest = words[rows * COLUMNS :]
    total = (rest * weights[: rest.numel()]).sum()
    return total + (words[: rows * COLUMNS].view(rows, COLUMNS).sum(0) * weights).sum() if rows else total


def _weights(device: torch.device) -> Tensor:
    if device not in _WEIGHTS:
        generator = torch.Generator().manual_seed(0x5DC)
        drawn = torch.randint(-(2**62), 2**62, (COLUMNS,), generator=generator)
        _WEIGHTS[device] = (drawn * 2 + 1).to(device)
    return _WEIGHTS[device]


@dataclass(frozen=True)
class Record:
    """Digests of one run of a step's passes on one rank, by point."""

    digests: Mapping[Point, int] = field(default_factory=dict)

    def difference(self, other: Record) -> Difference:
        """What differs, missing points included."""
        points = self.digests.keys() | other.digests.keys()
        differing = [p for p in points if self.digests.get(p) != other.digests.get(p)]
        first = min(differing, key=lambda point: point.order, default=None)
        return Difference(first, len(differing), len(points))

    def only(self, points: Iterable[Point]) -> Record:
        """Restricted to those points, for a comparison with a record that has no others."""
        return Record({p: self.digests[p] for p in points if p in self.digests})


@dataclass(frozen=True)
class Difference:
    """`first`: of the `differing` among `compared` points, the one that no other can have caused."""

    first: Point | None
    differing: int
    compared: int


class Recorder:
    """Observer that digests all it sees; nothing is read from the device before `record`."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._digests: list[Tensor] = []

    def see(
        self, point: Point, tensors: Sequence[Tensor], also: Callable[[Tensor], None] | None = None
    ) -> None:
        """`also`: as for `digest`."""
        self._points.append(point)
        self._digests.append(digest_all(tensors, also))

    def record(self) -> Record:
        """Waits for the device."""
        if not self._points:
            return Record()
        values = torch.stack(self._digests).tolist()
        return Record(dict(zip(self._points, values, strict=True)))
