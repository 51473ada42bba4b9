"""Non-finite numbers: whether there are any, and which rank made them.

Every stretch of computation between two exchanges with other ranks is looked at, with one sum a tensor, kept
on the device until the step's end: NaN and infinity survive every sum. Finite values whose sum leaves the
range of their dtype count as non-finite too; they are within a few orders of magnitude of it, and lost.

What a look costs is to read the tensor once more, so nothing is read for it twice: where all experts are on
the rank that calls them, what goes in and comes back is a copy of what is seen beside it; gradients before
their reduction are summed part by part while their digest has the part in the cache. `python -m
benchmarks.guards` measures it: about 2 % of a step's CPU time for six layers of width 384, 4,096 tokens, of
which half is spent on the gradients of 48 million parameters, whatever the number of tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltf.findings import Finding, Json, Severity
from ltf.guard.digest import Recorder
from ltf.guard.point import NOWHERE, WORDS, Phase, Point, Segment, from_words, maker
from ltf.parallel.shard import local


class Finite:
    """Observer of one step on one rank."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._sums: list[Tensor] = []

    def see(self, point: Point, tensors: Sequence[Tensor]) -> None:
        self._add(point, [_sum(tensor) for tensor in tensors])

    def _add(self, point: Point, sums: Sequence[Tensor]) -> None:
        self._points.append(point)
        self._sums.append(sums[0] if len(sums) == 1 else torch.stack(tuple(sums)).sum())

    def first(self, loss: Tensor | None) -> tuple[Point | None, bool]:
        """The first point that was not finite, and whether the loss was not; waits for the device once."""
        values = [s.float() for s in self._sums] + ([loss.detach().float()] if loss is not None else [])
        if not values:
            return None, False
        bad = torch.isfinite(torch.stack(values)).logical_not_().tolist()
        points = [point for point, is_bad in zip(self._points, bad, strict=False) if is_bad]
        return min(points, key=lambda point: point.order, default=None), loss is not None and bool(bad[-1])


class FiniteAndDigested:
    """Observer that does what `finite` and `recorder` do, reading every tensor once."""

    def __init__(self, finite: Finite, recorder: Recorder) -> None:
        self._finite = finite
        self._recorder = recorder

    def see(self, point: Point, tensors: Sequence[Tensor]) -> None:
        sums: list[Tensor] = []
        self._recorder.see(point, tensors, lambda part: sums.append(_sum(part)))
        self._finite._add(point, sums)


@dataclass(frozen=True)
class Report:
    """What one rank saw in a step. `state`: some of its own parameters or optimizer state are not finite."""

    first: Point | None = None
    loss: bool = False
    state: bool = False

    def words(self) -> list[float]:
        """REPORT_WORDS floats, for a gather."""
        point = NOWHERE if self.first is None else self.first.words()
        return [*point, float(self.loss), float(self.state)]

    @classmethod
    def of(cls, words: Sequence[float]) -> Report:
        """The inverse of `words`."""
        return cls(from_words(words), bool(words[WORDS]), bool(words[WORDS + 1]))


REPORT_WORDS = WORDS + 2


def report(seen: Finite, loss: Tensor | None, state: Iterable[Tensor]) -> Report:
    """`state`: parameters and the optimizer's tensors, looked at only where the step was not finite."""
    first, bad_loss = seen.first(loss)
    if first is None and not bad_loss:
        return Report()
    held = [local(tensor.detach()) for tensor in state]
    bad = [torch.isfinite(t).all().logical_not() for t in held if t.is_floating_point() and t.numel()]
    spoiled = any(bool(b) for b in bad)
    return Report(first, bad_loss, spoiled)


def attribute(
    step: int,
    reports: Sequence[Report],
    units: Sequence[int],
    *,
    layers: int,
    expert: int = 1,
    norm: float = 0.0,
) -> Finding | None:
    """What was not finite and who made it, from all ranks' reports; None if all was well.

    `units`: each rank's unit, the ranks that exchange activations. Inside a unit the earliest point by cause
    and effect is the origin; who met the value later received it. `expert`: ranks among which a layer's
    experts are divided. `norm`: the global gradient norm after the reduction.

    Nobody is named for a value that comes out of an exchange into which all ranks gave finite ones, for
    parameters that were not finite before the step, nor for the same origin in all of several independent
    units, which share only weights and settings.
    """
    spoiled = tuple(rank for rank, r in enumerate(reports) if r.state)
    evidence: dict[str, Json] = {"reports": [_described(r, layers) for r in reports]}
    if spoiled:
        return Finding(
            "finite.parameters",
            Severity.ERROR,
            step,
            f"parameters or optimizer state were not finite before the step (held by {_ranks(spoiled)}); "
            "no rank is to blame for what followed in it",
            evidence={**evidence, "held_by": list(spoiled)},
        )
    origins = _origins(reports, units)
    if not origins:
        return _without_origin(step, reports, norm, evidence)
    first = min((point for point, _ in origins.values()), key=lambda point: point.order)
    evidence |= {"origins": {str(unit): _place(p, layers, ranks) for unit, (p, ranks) in origins.items()}}
    kind = "finite.activation" if first.phase is Phase.FORWARD else "finite.gradient"
    what = f"{maker(first, layers)} {_manner(first)}"
    everywhere = len(origins) == len(set(units)) > 1
    if everywhere and len({point.place for point, _ in origins.values()}) == 1:
        return Finding(
            kind,
            Severity.ERROR,
            step,
            f"every unit of ranks made it alike, so no rank is named: {what}",
            (),
            evidence,
        )
    culprits = sorted(r for p, ranks in origins.values() if _computed_here(p, expert) for r in ranks)
    if not culprits:
        ranks = tuple(r for _, rs in origins.values() for r in rs)
        message = f"{what} with finite values on every rank before it: lost on the way to {_ranks(ranks)}"
        return Finding(kind, Severity.ERROR, step, message, (), evidence)
    names = tuple(culprits)
    verb = "made it" if len(names) == 1 else "each made some; the first"
    return Finding(kind, Severity.ERROR, step, f"{_ranks(names)} {verb}: {what}", names, evidence)


def _origins(reports: Sequence[Report], units: Sequence[int]) -> dict[int, tuple[Point, tuple[int, ...]]]:
    by_unit: Mapping[int, list[tuple[Point, int]]] = defaultdict(list)
    for rank, (found, unit) in enumerate(zip(reports, units, strict=True)):
        if found.first is not None:
            by_unit[unit].append((found.first, rank))
    origins = {}
    for unit, points in sorted(by_unit.items()):
        first = min((point for point, _ in points), key=lambda point: point.order)
        origins[unit] = first, tuple(rank for point, rank in points if point == first)
    return origins


def _without_origin(
    step: int, reports: Sequence[Report], norm: float, evidence: dict[str, Json]
) -> Finding | None:
    losing = tuple(rank for rank, found in enumerate(reports) if found.loss)
    if losing:
        message = f"the loss of {_ranks(losing)} is not finite although its logits are"
        return Finding("finite.loss", Severity.ERROR, step, message, losing, evidence)
    if not math.isfinite(norm):
        message = (
            f"the gradient norm is {norm} although every rank's gradients were finite before the reduction: "
            "they overflowed in it or were spoiled on the way; no rank is named"
        )
        return Finding("finite.reduction", Severity.ERROR, step, message, (), evidence)
    return None


def _computed_here(point: Point, expert: int) -> bool:
    """Whether nothing from another rank lies between this point and the one before it."""
    arrived = (Phase.FORWARD, Segment.EXPERTS_IN), (Phase.BACKWARD, Segment.EXPERTS)
    if expert > 1 and (point.phase, point.segment) in arrived:
        return False
    return (point.phase, point.segment) != (Phase.FORWARD, Segment.RECEIVED)


def _manner(point: Point) -> str:
    where = f"micro-batch {point.micro_batch}"
    match point.phase:
        case Phase.FORWARD if point.segment is Segment.EMBED:
            return f"had non-finite outputs in the forward pass of {where}"
        case Phase.FORWARD:
            return f"had finite inputs and non-finite outputs in the forward pass of {where}"
        case Phase.BACKWARD:
            return f"took finite gradients and gave non-finite ones in the backward pass of {where}"
        case _:
            return "were not finite before their reduction, although all gradients of activations were"


def _place(point: Point, layers: int, ranks: Sequence[int]) -> Json:
    return {
        "phase": point.phase.name.lower(),
        "micro_batch": point.micro_batch,
        "layer": point.layer,
        "segment": point.segment.name.lower(),
        "maker": maker(point, layers),
        "ranks": list(ranks),
    }


def _described(found: Report, layers: int) -> Json:
    first = None if found.first is None else _place(found.first, layers, ())
    return {"first": first, "loss": found.loss, "state": found.state}


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)


def _sum(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.sum(dtype=torch.float32) if tensor.dtype is torch.float16 else found.sum()
