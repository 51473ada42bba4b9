"""The states of a node and the ways between them. What is allowed is data: ``lifecycle.yaml``."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from inventory.errors import UsageError


class State(enum.StrEnum):
    """Where a node is in its life; ``describe(state).means`` says it in words."""

    NEW = "new"
    """Also every node that the ledger has never heard of."""
    VALIDATING = "validating"
    AVAILABLE = "available"
    ALLOCATED = "allocated"
    DRAINING = "draining"
    CORDONED = "cordoned"
    TRIAGED_HARDWARE = "triaged_hardware"
    TRIAGED_USER = "triaged_user"
    TRIAGED_PLATFORM = "triaged_platform"
    TRIAGED_UNKNOWN = "triaged_unknown"
    RESTARTING = "restarting"
    REPAIRING = "repairing"
    HELD = "held"
    RETIRED = "retired"


class IllegalTransition(UsageError):
    """The lifecycle has no such way; the message lists the ways that it has."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A way from one state to another, and what has happened when a node goes it."""

    source: State
    target: State
    means: str


@dataclass(frozen=True, slots=True)
class StateFacts:
    """What ``lifecycle.yaml`` says about one state."""

    state: State
    means: str
    jobs_take: bool
    load_allowed: bool
    original: tuple[str, ...]
    """What SIGMA's platform calls it."""
    ways: Mapping[State, Transition]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one verdict does in one state."""

    target: State | None
    """None: the node stays where it is."""
    needs_clearing: bool = False
    """Only if what took the node out was checked again and passed."""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """The whole table, read and checked."""

    states: Mapping[State, StateFacts]
    after_validation: Mapping[tuple[State, str], Rule]
    """(state, verdict) -> rule; every pair is there."""


def parse(name: str) -> State:
    """The state called `name`; UsageError with the known names if there is none."""
    try:
        return State(name)
    except ValueError:
        known = ", ".join(State)
        raise UsageError(f"there is no node state '{name}'; the states are {known}") from None


def describe(state: State | str) -> StateFacts:
    """Meaning, permissions and ways out of `state`."""
    return table().states[parse(state)]


def transition(source: State | str, target: State | str) -> Transition:
    """The way from `source` to `target`; if there is none, IllegalTransition lists the legal next states."""
    start, end = parse(source), parse(target)
    ways = describe(start).ways
    if end in ways:
        return ways[end]
    legal = ", ".join(sorted(ways))
    if start is end:
        raise IllegalTransition(f"the state is already {start}; from there a node may go to: {legal}")
    raise IllegalTransition(f"a node may not go from {start} to {end}; from {start} it may go to: {legal}")


def jobs_take(state: State | str) -> bool:
    """May a job be given a node in this state?"""
    return describe(state).jobs_take


def may_load(state: State | str, told: bool = False) -> bool:
    """May a validation put load on a node in this state? `told`: a person said so for this run."""
    return told or describe(state).load_allowed


def next_after_validation(state: State | str, verdict: str, *, cleared: bool = False) -> Transition | None:
    """The transition that a verdict calls for, or None when the node stays where it is.

    `verdict` is ``healthy``, ``degraded``, ``unhealthy`` or ``unknown``. `cleared` says that every check
    whose failure took the node out has been run again and passed (see :func:`clears`); a node that is out of
    service with evidence against it comes back only then.
    """
    rule = table().after_validation.get((parse(state), str(verdict)))
    if rule is None:
        raise ValueError(f"no verdict is called {verdict!r}")
    if rule.target is None or (rule.needs_clearing and not cleared):
        return None
    return transition(state, rule.target)


def clears(evidence: Mapping[str, object], checks: Mapping[str, str]) -> bool:
    """Do the outcomes of a new run answer the evidence that took a node out?

    `evidence` is that of the transition which took it out: its ``findings`` are mappings with ``check`` and
    ``outcome``. `checks` are the outcomes of the new run by check. True when each failed check passed now;
    False when the evidence names no check, for then nothing shows that its cause is gone.
    """
    findings = evidence.get("findings")
    if not isinstance(findings, list | tuple):
        return False
    failed = {str(f.get("check")) for f in findings if isinstance(f, Mapping) and f.get("outcome") == "fail"}
    return bool(failed) and all(checks.get(check) == "pass" for check in failed)


@functools.cache
def table() -> Lifecycle:
    """``lifecycle.yaml``, read once and checked: every state and every verdict is there."""
    from inventory.lifecycle_table import read_table

    return read_table()
