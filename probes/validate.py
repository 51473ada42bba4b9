"""Run a plan of checks over many nodes and judge what comes back.

Every node is judged by itself as soon as it ends, so that failures can be shown as they come; peers and
baselines follow when all have ended. What happens to a node, or on the way to it, is in its verdict and is
never raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from inventory.fleet import Node
from inventory.transport import Limits, Transport
from probes.baseline import Baseline
from probes.fleetwide import BaselineKey, Member, Note
from probes.model import CheckRecord, NodeVerdict, Verdict
from probes.plan import Plan
from probes.profiles import RuleBook


class Observer:
    """Told what happens as it happens, on the event loop: its methods must return at once.

    A base class: what a subclass leaves out is not told.
    """

    def node_started(self, node: str) -> None:
        """The node's turn has come. Told again when it is loaded after its quiet checks."""

    def record(self, node: str, record: CheckRecord) -> None:
        """One check ended on the node."""

    def node_done(self, verdict: NodeVerdict) -> None:
        """The verdict so far: peers and baselines can still make it worse."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a validation is carried out."""

    concurrency: int = 64
    limits: Limits = field(default_factory=Limits)
    """For connecting; the time for the command follows from the budgets."""
    quiet_budget: float = 120.0
    """Seconds that the checks without load may take on one node, all together."""
    load_margin: float = 60.0
    """Seconds that the loading checks may take together, beyond the sum of their own limits."""


@dataclass(frozen=True)
class ValidationResult:
    """What is known about every node that was asked for, in their order."""

    plan: Plan
    verdicts: tuple[NodeVerdict, ...]
    notes: tuple[Note, ...] = ()
    members: tuple[Member, ...] = ()
    """What was measured of the metrics that peers and baselines compare."""
    started: float = 0.0
    """Unix time."""
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def summary(self) -> dict[Verdict, int]:
        counts = dict.fromkeys(Verdict, 0)
        for verdict in self.verdicts:
            counts[verdict.verdict] += 1
        return counts


async def validate(
    nodes: Sequence[Node],
    plan: Plan,
    transport: Transport,
    rules: RuleBook,
    *,
    baselines: Mapping[BaselineKey, Baseline] | None = None,
    in_use_by: Mapping[str, str] | None = None,
    observer: Observer | None = None,
    options: Options | None = None,
    stop: asyncio.Event | None = None,
    clock: Callable[[], float] = time.time,
) -> ValidationResult:
    """Verdicts on `nodes` by `plan`, over `transport` (entered by the caller).

    `in_use_by`: node -> why it must not be loaded ("allocated to job 7"), as the ledger knows it.
    Setting `stop`, or cancelling the task, ends the run early: what is known by then is in the result,
    the rest is unknown. Raises UsageError, before any node is touched, for a SKU or limits in the
    inventory that are wrong.
    """
    from probes.run import ValidationRun

    rules.check(nodes)
    run = ValidationRun(
        nodes,
        plan,
        transport,
        rules,
        observer=observer or Observer(),
        options=options or Options(),
        clock=clock,
    )
    started = clock()
    await run.probe(stop or asyncio.Event(), in_use_by or {})
    verdicts, members, notes = run.conclude(baselines or {})
    return ValidationResult(
        plan=plan,
        verdicts=verdicts,
        notes=notes,
        members=members,
        started=started,
        seconds=max(0.0, clock() - started),
        interrupted=run.interrupted,
    )
