"""Runs a step again, here and on a partner, to find out whether the hardware computed what it was told.

All ranks take part in every run and every exchange, and decide from the same gathered numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ltf.data.loader import Batch
from ltf.findings import Finding
from ltf.guard.digest import Difference, Record
from ltf.guard.point import NOWHERE, WORDS, Phase, Point, Segment, from_words
from ltf.guard.verdict import Kind, Setting, Verdict, clean_pair, judge, pairs
from ltf.guard.watch import Gradients, Watch, device_kind
from ltf.parallel.layout import Layout
from ltf.passes import Passed, Passes, Totals

MOST_RUNS = 4


class Ranks(Protocol):
    """What a replay needs to know of the other ranks; `ltf.parallel.world.World` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def control(self) -> dist.ProcessGroup: ...
    def gather(self, values: Sequence[float]) -> list[list[float]]: ...


@dataclass(frozen=True)
class Outcome:
    """`passed`: of the run whose gradients now lie in the parameters. `repaired`: it is not the original.

    `trusted`: two runs agreed on every rank that these are what the batch gives, or kernels vary by nature
    and disagreement means nothing. Whether devices agree with their partners is for the verdict to say.
    """

    verdict: Verdict
    finding: Finding | None
    passed: Passed
    repaired: bool
    trusted: bool


@dataclass(frozen=True)
class _Run:
    record: Record
    passed: Passed
    gradients: Gradients


class Replay:
    """Needs a constant state: between a step's passes and its update, all under the same `watch`.

    The passes must be a function of parameters and batches alone (no dropout), and leave `grad` as they would
    from None.
    """

    def __init__(self, passes: Passes, watch: Watch, world: Ranks) -> None:
        self._passes, self._watch, self._world = passes, watch, world
        layout = world.layout
        self._units = [layout.unit(rank) for rank in range(layout.world)]

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        totals: Totals,
        passed: Passed,
        *,
        suspicion: Finding | None = None,
        partner: bool = True,
    ) -> Outcome:
        """After `watch.finish` of this step and before clipping. `passed`: what the step's passes gave.

        `suspicion`: what led to it; none at an interval. All ranks call it with the same step and suspicion.
        Costs one more run of the passes, two with a partner, up to four where bits differ.
        """
        setting = Setting(
            self._units,
            self._watch.layers,
            self._everywhere(torch.are_deterministic_algorithms_enabled()),
            suspicion is not None,
            () if suspicion is None else suspicion.ranks,
        )
        runs = [_Run(self._watch.record, passed, self._taken())]
        runs.append(self._run(step, batches, totals))
        repeats = {(0, 1): self._compared(runs[0], runs[1])}
        most = MOST_RUNS if setting.deterministic else 2
        while clean_pair(repeats) is None and len(runs) < most:
            runs.append(self._run(step, batches, totals))
            for a, b in pairs(len(runs)):
                if (a, b) not in repeats:
                    repeats[a, b] = self._compared(runs[a], runs[b])
        agreed = clean_pair(repeats)
        partners = None
        if agreed == (0, 1) and partner and setting.count > 1:
            partners = self._partners(step, batches, totals, runs[1].record)
        verdict = judge(repeats, partners, setting)
        # Where no two agree, the original is as good as any.
        best = 0 if agreed is None else agreed[0]
        runs[best].gradients.put_back()
        trusted = agreed is not None or verdict.kind is Kind.NOT_DETERMINISTIC
        return Outcome(verdict, verdict.finding(step), runs[best].passed, best != 0, trusted)

    def _run(self, step: int, batches: Sequence[Batch], totals: Totals) -> _Run:
        self._watch.begin(step, digests=True)
        passed = self._passes(batches, totals)
        self._watch.finish(passed)
        return _Run(self._watch.record, passed, self._taken())

    def _taken(self) -> Gradients:
        return Gradients(parameter for _, parameter in self._watch.parameters)

    def _compared(self, a: _Run, b: _Run) -> list[Difference]:
        """By rank. An original that was not digested whole is compared in what it has."""
        points = a.record.digests.keys() & b.record.digests.keys()
        whole = len(a.record.digests) == len(b.record.digests)
        mine = (
            a.record.difference(b.record)
            if whole
            else a.record.only(points).difference(b.record.only(points))
        )
        return [_from_words(row) for row in self._world.gather(_words(mine))]

    def _partners(
        self, step: int, batches: Sequence[Batch], totals: Totals, own: Record
    ) -> list[Difference | None]:
        """By rank: its run of the next unit's batches against that unit's own run of them."""
        lent = _unpacked(self._from_next(_packed(batches)), self._world.device)
        there = _record_of(self._from_next(_numbers_of(own)))
        here = self._run(step, lent, totals).record
        # The reduction adds the same terms in another order of ranks.
        local = [p for p in here.digests.keys() | there.digests.keys() if p.phase is not Phase.REDUCED]
        mine = there.only(local).difference(here.only(local))
        kind = hashlib.sha256(device_kind(self._world.device).encode()).digest()
        rows = self._world.gather([*_words(mine), float(int.from_bytes(kind[:6]))])
        return [
            _from_words(row) if row[-1] == rows[self._next(rank)][-1] else None
            for rank, row in enumerate(rows)
        ]

    def _next(self, rank: int, by: int = 1) -> int:
        """The rank at the same place in the next unit."""
        layout = self._world.layout
        unit = layout.unit(rank)
        place = layout.unit_ranks(unit).index(rank)
        return layout.unit_ranks((unit + by) % layout.units)[place]

    def _from_next(self, values: Tensor) -> Tensor:
        """int64 values go to the unit before; those of the next unit come."""
        group, rank = self._world.control, self._world.rank
        there, back = self._next(rank), self._next(rank, -1)
        length = torch.zeros(1, dtype=torch.int64)
        sent = dist.isend(torch.tensor([values.numel()]), back, group=group)
        dist.recv(length, there, group=group)
        assert sent is not None
        sent.wait()
        received = torch.empty(int(length), dtype=torch.int64)
        sent = dist.isend(values, back, group=group)
        dist.recv(received, there, group=group)
        assert sent is not None
        sent.wait()
        return received

    def _everywhere(self, yes: bool) -> bool:
        return all(row[0] > 0 for row in self._world.gather([float(yes)]))


def _words(difference: Difference) -> list[float]:
    first = NOWHERE if difference.first is None else difference.first.words()
    return [*first, float(difference.differing), float(difference.compared)]


def _from_words(words: Sequence[float]) -> Difference:
    return Difference(from_words(words), int(words[WORDS]), int(words[WORDS + 1]))


def _packed(batches: Sequence[Batch]) -> Tensor:
    """Every batch as numbers: its samples' count, its length, the samples, then its five tensors."""
    pieces = [torch.tensor([len(batches)])]
    for batch in batches:
        pieces.append(torch.tensor([*batch.tokens.shape, *batch.samples]))
        for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.document_ids, batch.position_ids):
            pieces.append(tensor.cpu().to(torch.int64).flatten())
    return torch.cat(pieces)


def _unpacked(numbers: Tensor, device: torch.device) -> list[Batch]:
    batches, at = [], 1
    for _ in range(int(numbers[0])):
        rows, length = (int(n) for n in numbers[at : at + 2])
        samples = tuple(int(n) for n in numbers[at + 2 : at + 2 + rows])
        at += 2 + rows
        tensors = numbers[at : at + 5 * rows * length].view(5, rows, length).clone().unbind()
        at += 5 * rows * length
        batches.append(Batch(samples, *tensors).to(device))
    return batches


def _numbers_of(record: Record) -> Tensor:
    rows = [(p.phase, p.micro_batch, p.layer, p.segment, value) for p, value in record.digests.items()]
    return torch.tensor(rows, dtype=torch.int64).flatten()


def _record_of(numbers: Tensor) -> Record:
    return Record(
        {
            Point(Phase(phase), micro_batch, layer, Segment(segment)): value
            for phase, micro_batch, layer, segment, value in numbers.view(-1, 5).tolist()
        }
    )
