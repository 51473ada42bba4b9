"""The values that go into the ledger and come out of it. Times are seconds since the epoch, UTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inventory.lifecycle import State


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Events are never changed and never deleted."""

    id: int
    """Grows with every event; the order of events is the order of ids."""
    time: float
    kind: str
    """``transition``, or what :meth:`Ledger.record_event` was told."""
    node: str | None
    actor: str
    reason: str
    evidence: Mapping[str, Any]
    run: str | None = None
    source: State | None = None
    """For a transition: the state before it."""
    target: State | None = None
    """For a transition: the state after it."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """Where a node is now and why. A node that the ledger has never seen is `new`, since None."""

    node: str
    state: State
    since: float | None = None
    reason: str = ""
    actor: str = ""
    run: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Of the transition that led here."""


@dataclass(frozen=True, slots=True)
class Run:
    """One validation (or other measured pass over nodes)."""

    id: str
    """Sorts by time of start: ``20260102T030405.678-k3f9q2``."""
    kind: str
    started: float
    finished: float | None
    """None: it runs still, or it was killed."""
    plan: str
    actor: str
    selection: str
    summary: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """What a run found out about one node."""

    node: str
    verdict: str
    """``healthy``, ``degraded``, ``unhealthy`` or ``unknown``."""
    sku: str | None = None
    findings: Sequence[Mapping[str, Any]] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    """Every check of the plan and its worst outcome."""
    seconds: float = 0.0
    run: str | None = None
    """Filled in by the ledger; ignored when written."""
    time: float | None = None
    """When it was recorded. Filled in by the ledger; ignored when written."""


@dataclass(frozen=True, slots=True)
class MeasurementRow:
    """One number that a run measured on a node, kept to learn baselines from.

    SKU and verdict are those of the node's VerdictRow in the same run.
    """

    node: str
    metric: str
    """Full name: ``family.check.metric``."""
    value: float
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a call of prune removed."""

    runs: int
    verdicts: int
    measurements: int
