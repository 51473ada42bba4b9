"""Short digests of tensors' bits, and the record of a step's passes that is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ltf.guard.point import Point

COLUMNS = 2048
_WEIGHTS: dict[torch.device, Tensor] = {}


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device, the same whatever the order in which the device adds.

    The bytes, eight at a time, are added without carry out of 64 bits in columns; columns are multiplied by
    odd random numbers and added. One flipped bit changes a column by a power of two and so always changes
    the digest, and so does a value that moves to another column. Missed for certain: values that trade places
    within a column (COLUMNS * 8 bytes apart), and two changes of a column that cancel exactly, such as the
    same bit set in one and cleared in the other. Any other change is missed with a chance of about 2^-64.
    """
    data = tensor.detach().contiguous().view(-1)
    words = data.numel() * data.element_size() // 8
    whole = words * 8 // data.element_size()
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    if words:
        head = data[:whole]
        if head.storage_offset() * data.element_size() % 8:
            head = head.clone()
        total = _sum(head.view(torch.int64))
    if whole < data.numel():
        tail = data[whole:].clone().view(torch.uint8).to(torch.int64)
        # A multiplier of its own: the last bytes must not look like a first word.
        total = total + (tail * _weights(data.device)[-tail.numel() :]).sum() * 0x51D7348DA1
    return total


def digest_all(tensors: Sequence[Tensor]) -> Tensor:
    """Of several tensors in order."""
    if len(tensors) == 1:
        return digest(tensors[0])
    each = torch.stack([digest(tensor) for tensor in tensors])
    return _sum(each)


def _sum(words: Tensor) -> Tensor:
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

    def see(self, point: Point, tensors: Sequence[Tensor]) -> None:
        self._points.append(point)
        self._digests.append(digest_all(tensors))

    def record(self) -> Record:
        """Waits for the device."""
        if not self._points:
            return Record()
        values = torch.stack(self._digests).tolist()
        return Record(dict(zip(self._points, values, strict=True)))
