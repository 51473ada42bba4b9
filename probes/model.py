"""The values that probing is about: measures, records of checks, findings, verdicts. Controller side."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

Value = float | int | str | bool | None


class Status(enum.StrEnum):
    """How a check on a node ended, before anybody judged what it measured."""

    ANSWERED = "answered"
    UNSUPPORTED = "unsupported"
    """The node has no such tool, file or device support: nothing was measured."""
    ERROR = "error"
    """The check broke, or its output could not be parsed."""
    TIMEOUT = "timeout"
    MISSING = "missing"
    """No record arrived: the agent or the connection ended first."""
    NOT_APPLICABLE = "not_applicable"
    """By the plan: the node has nothing that this check is about (no such vendor's device, say)."""


class Outcome(enum.StrEnum):
    """What a finding says. PASS never is a finding; it fills the heat map."""

    PASS = "pass"  # noqa: S105
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    NOT_APPLICABLE = "not_applicable"


class Verdict(enum.StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Measure:
    """One value that a check saw. `metric` is its last name: the full one is ``family.check.metric``."""

    metric: str
    device: str | None
    value: Value


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """What came back from a node for one check."""

    check: str
    status: Status
    seconds: float = 0.0
    measures: tuple[Measure, ...] = ()
    evidence: tuple[str, ...] = ()
    """Lines, capped, as the node's tools printed them."""
    detail: str = ""
    """For a status other than ANSWERED: what happened."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Everything that one run of the agent on one node gave."""

    node: str
    sku: str | None
    records: Mapping[str, CheckRecord]
    hello: Mapping[str, Value] = field(default_factory=dict)
    """The agent's first words: python, hostname, boot_id, uid, clock_offset (seconds, node minus
    controller)."""
    failure: str = ""
    """Why the node could not be probed at all or to the end; empty when the agent finished."""
    failure_phase: str = ""
    """The transport's phase of that failure, e.g. ``auth``; with its ending, e.g. ``timeout``."""
    failure_ending: str = ""
    failure_action: str = ""
    """What a person can do about that failure."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a node is not simply healthy. The fields of the ``ltpctl/validate/1`` output."""

    check: str
    outcome: Outcome
    message: str
    metric: str | None = None
    device: str | None = None
    value: Value = None
    unit: str = ""
    limit: str = ""
    source: str = ""
    """Whose limit: ``sku:h100``, ``inventory``, ``peers``, ``baseline``, ``default``."""
    reference: str = ""
    """Where that limit comes from: a document, a formula, the peers' numbers."""
    action: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    node: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    """Worst first."""
    checks: Mapping[str, Outcome]
    """Every check of the plan, worst outcome each; nothing is absent."""
    sku: str | None = None
    seconds: float = 0.0
