"""From what every check found to one verdict for the node. Pure, and fail closed.

Any failure: unhealthy. Else anything that is not known (a check that timed out, broke or gave no answer, or
one whose answer is demanded and that is unsupported, see probes.criteria): unknown. Else any warning:
degraded. Else healthy, if any check answered at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from probes.criteria import SEVERITY
from probes.model import Finding, NodeVerdict, Outcome, Verdict

BADNESS = {Verdict.HEALTHY: 0, Verdict.DEGRADED: 1, Verdict.UNKNOWN: 2, Verdict.UNHEALTHY: 3}
"""Adding a finding never lowers it."""


def fold(
    node: str,
    outcomes: Mapping[str, Outcome],
    findings: Iterable[Finding],
    *,
    sku: str | None = None,
    seconds: float = 0.0,
) -> NodeVerdict:
    """The verdict of one node.

    `outcomes` has every check of the plan. A finding of a check that is not among them (the transport's, say)
    counts as well.
    """
    ordered = tuple(sorted(findings, key=_order))
    checks = dict(outcomes)
    for finding in ordered:
        known = checks.get(finding.check)
        if known is None or SEVERITY[finding.outcome] < SEVERITY[known]:
            checks[finding.check] = finding.outcome
    return NodeVerdict(node, _verdict(checks), ordered, checks, sku, seconds)


def _verdict(checks: Mapping[str, Outcome]) -> Verdict:
    worst = Verdict.HEALTHY
    for outcome in checks.values():
        says = effect(outcome)
        if BADNESS[says] > BADNESS[worst]:
            worst = says
    if worst is Verdict.HEALTHY and Outcome.PASS not in checks.values():
        # Nothing answered: that is no proof of health.
        return Verdict.UNKNOWN
    return worst


def effect(outcome: Outcome) -> Verdict:
    """The best verdict that a node can still have with this outcome."""
    match outcome:
        case Outcome.FAIL:
            return Verdict.UNHEALTHY
        case Outcome.TIMEOUT | Outcome.UNKNOWN:
            return Verdict.UNKNOWN
        case Outcome.UNSUPPORTED:
            return Verdict.HEALTHY
        case Outcome.WARN:
            return Verdict.DEGRADED
        case Outcome.PASS | Outcome.NOT_APPLICABLE:
            return Verdict.HEALTHY


def _order(finding: Finding) -> tuple[object, ...]:
    """Worst first; then by check, metric and device in the order of a person's counting."""
    return (
        -BADNESS[effect(finding.outcome)],
        SEVERITY[finding.outcome],
        finding.check,
        finding.metric or "",
        _natural(finding.device or ""),
        finding.source,
        finding.message,
    )


def _natural(text: str) -> tuple[tuple[int, str | int], ...]:
    return tuple(
        (0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", text) if part
    )
