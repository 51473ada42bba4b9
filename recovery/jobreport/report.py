"""What a report tells, gathered from the journal."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from recovery.accounting import (
    Account,
    Accountant,
    AttemptStarted,
    Decided,
    Diagnosed,
    Entry,
    FaultDetected,
    GotNodes,
    Outcome,
    Resumed,
    Span,
    Step,
    Stopped,
    Submitted,
    Summary,
    Validated,
    summary,
)

LARGEST = 1e100
"""A value beyond it can be drawn no better than an infinity."""


def drawable(value: float) -> bool:
    """Whether a chart can show the value where it is."""
    return abs(value) < LARGEST


@dataclass(frozen=True)
class Stretch:
    """Steps in a row: a new stretch begins with an attempt and where training went back."""

    attempt: int
    steps: Sequence[int]
    loss: Sequence[float]
    """NaN both for a loss that is none and for one that was not told; `lossless` has the former."""
    rate: Sequence[float]
    """Tokens per second of the step, or steps per second where the tokens are not known; NaN where neither
    is."""
    lossless: Sequence[int]
    """Steps whose loss was not a finite number."""


@dataclass(frozen=True)
class Happening:
    """Something that a person should know of: a fault, a diagnosis, a decision."""

    time: float
    kind: str
    """``fault``, ``diagnosis``, ``decision`` or ``stop``."""
    attempt: int | None
    title: str
    text: str = ""
    nodes: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeLine:
    """A node and what it was to the job."""

    name: str
    role: str
    """``training``, ``spare``, ``used before`` or ``replaced``."""
    attempts: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class JobReport:
    name: str
    now: float
    """When the report was made, seconds since 1970."""
    account: Account
    spans: tuple[Span, ...]
    summary: Summary
    stretches: tuple[Stretch, ...]
    tokens_known: bool
    happenings: tuple[Happening, ...]
    nodes: tuple[NodeLine, ...]
    facts: tuple[tuple[str, str], ...] = ()
    """Shown in the head: launcher, configuration, whatever the caller wants said."""


def job_report(
    entries: Iterable[Entry], now: float, *, name: str = "", facts: Sequence[tuple[str, str]] = ()
) -> JobReport:
    """Read a journal. `name` is that of the ``Submitted`` entry unless given; `now` in seconds since 1970."""
    accountant = Accountant()
    curves = _Curves()
    nodes = _Nodes()
    happenings: list[Happening] = []
    for entry in entries:
        accountant.add(entry)
        if isinstance(entry, Step):
            curves.step(entry)
            continue
        nodes.add(entry)
        if isinstance(entry, Submitted):
            name = name or entry.job
        elif (told := _happening(entry)) is not None:
            happenings.append(told)
    account = accountant.account(now)
    return JobReport(
        name=name or "job",
        now=now,
        account=account,
        spans=accountant.timeline(now),
        summary=summary(account),
        stretches=curves.stretches(),
        tokens_known=curves.tokens_known,
        happenings=tuple(happenings),
        nodes=nodes.lines(running=account.outcome is None),
        facts=tuple(facts),
    )


def verdict(account: Account) -> tuple[str, str]:
    """One word for its colour (``good``, ``fair``, ``bad``) and one sentence for the head of the report."""
    faults = len(account.faults)
    survived = sum(fault.resumed is not None for fault in account.faults)
    came_back = "without a fault"
    if faults:
        back = "all" if survived == faults else f"{survived} of them"
        came_back = f"after {faults} fault{'s' if faults > 1 else ''}, recovered from {back}"
    match account.outcome:
        case Outcome.FINISHED:
            return (
                "good" if faults == survived else "fair"
            ), f"finished at step {account.last_step} {came_back}"
        case Outcome.STOPPED:
            return "fair", f"stopped at step {account.last_step} {came_back}"
        case Outcome.FAILED:
            worst = account.faults[-1] if account.faults else None
            why = f": {worst.cause} ({worst.blame})" if worst else ""
            return "bad", f"failed at step {account.last_step}{why}"
    if account.buckets and account.phase.value == "productive":
        return "good", f"training, step {account.last_step}, {came_back}"
    return "fair", f"{account.phase.value}, step {account.last_step}, {came_back}"


def _happening(entry: Entry) -> Happening | None:
    match entry:
        case FaultDetected():
            ranks = f" (rank {', '.join(map(str, entry.ranks))})" if entry.ranks else ""
            title = f"{entry.cause}{ranks}, {entry.blame}"
            return Happening(
                entry.time, "fault", entry.attempt, title, entry.message, entry.nodes, entry.evidence
            )
        case Diagnosed():
            title = f"{entry.cause}, {entry.blame}"
            return Happening(entry.time, "diagnosis", entry.attempt, title, "", entry.nodes, entry.evidence)
        case Decided():
            return Happening(
                entry.time,
                "decision",
                entry.attempt,
                entry.decision,
                entry.reason,
                entry.replaced,
                entry.evidence,
            )
        case Resumed(reason="roll_back"):
            title = f"rolled back to step {entry.step}"
            return Happening(entry.time, "fault", entry.attempt, title, entry.cause)
        case Stopped():
            return Happening(
                entry.time,
                "stop",
                None,
                f"stop asked for{' by ' + entry.by if entry.by else ''}",
                entry.reason,
            )
    return None


@dataclass
class _Curves:
    done: list[Stretch] = field(default_factory=list)
    tokens_known: bool = False
    _attempt: int = -1
    _columns: tuple[array[int], array[float], array[float], array[float], array[int]] | None = None

    def step(self, step: Step) -> None:
        columns = self._columns
        if columns is None or step.attempt > self._attempt or step.step < columns[0][-1]:
            self._close()
            self._attempt = step.attempt
            columns = self._columns = array("q"), array("d"), array("d"), array("d"), array("q")
        elif step.step == columns[0][-1] or step.attempt < self._attempt:
            return
        steps, losses, by_token, by_step, lossless = columns
        steps.append(step.step)
        loss = step.loss
        if loss is not None and not drawable(loss):
            lossless.append(step.step)
            loss = None
        losses.append(math.nan if loss is None else loss)
        self.tokens_known |= step.tokens is not None
        slow = step.seconds > 0
        by_token.append(step.tokens / step.seconds if slow and step.tokens is not None else math.nan)
        by_step.append(1 / step.seconds if slow else math.nan)

    def stretches(self) -> tuple[Stretch, ...]:
        self._close()
        return tuple(self.done)

    def _close(self) -> None:
        if self._columns is not None:
            steps, losses, by_token, by_step, lossless = self._columns
            rate = by_token if self.tokens_known else by_step
            self.done.append(Stretch(self._attempt, steps, losses, rate, lossless))
            self._columns = None


@dataclass
class _Nodes:
    attempts: dict[str, list[int]] = field(default_factory=dict)
    spares: dict[str, None] = field(default_factory=dict)
    now: tuple[str, ...] = ()
    why: dict[str, str] = field(default_factory=dict)
    failed: dict[str, None] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        match entry:
            case Submitted() | GotNodes():
                for node in entry.nodes:
                    self.attempts.setdefault(node, [])
                self.spares |= dict.fromkeys(entry.spares)
            case Validated():
                for node in entry.failed:
                    self.why.setdefault(node, "failed validation")
            case AttemptStarted() if entry.nodes:
                self.now = tuple(dict.fromkeys(entry.nodes))
                for node in self.now:
                    self.attempts.setdefault(node, []).append(entry.attempt)
            case Decided():
                for node in entry.replaced:
                    self.why[node] = entry.reason or entry.decision
                    self.failed[node] = None
            case _:
                pass

    def lines(self, *, running: bool) -> tuple[NodeLine, ...]:
        lines = []
        for node in dict.fromkeys([*self.attempts, *self.spares, *self.why]):
            if node in self.now:
                role = "training" if running else "at the end"
            elif node in self.failed:
                role = "replaced"
            elif node in self.spares:
                role = "spare"
            else:
                role = "used before" if self.attempts.get(node) else "not used"
            lines.append(NodeLine(node, role, tuple(self.attempts.get(node, ())), self.why.get(node, "")))
        order = ("replaced", "training", "at the end", "spare", "used before", "not used")
        return tuple(sorted(lines, key=lambda line: (order.index(line.role), line.name)))
