"""What changed between two validations. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from inventory.ledger.records import VerdictRow
from probes.model import Finding, Outcome, Verdict
from probes.report import finding_from_json
from probes.verdict import BADNESS

Key = tuple[str, str | None, str | None]
"""Check, metric, device: what a finding is about."""


@dataclass(frozen=True, slots=True)
class NodeChange:
    """What is different about one node that both runs saw."""

    node: str
    before: Verdict
    after: Verdict
    appeared: tuple[Finding, ...] = ()
    """Findings that were not there, or were milder."""
    gone: tuple[Finding, ...] = ()
    """Findings that are no more, or have become milder; as they were. Those of a check that could not be
    carried out this time are not gone."""

    @property
    def worse(self) -> bool:
        return BADNESS[self.after] > BADNESS[self.before]

    @property
    def better(self) -> bool:
        """A node about which nothing is known any more has not improved."""
        return BADNESS[self.after] < BADNESS[self.before] and self.after is not Verdict.UNKNOWN


@dataclass(frozen=True, slots=True)
class Difference:
    """Each in the order of the later run."""

    worse: tuple[NodeChange, ...]
    recovered: tuple[NodeChange, ...]
    """Healthy again."""
    better: tuple[NodeChange, ...]
    """Improved, not healthy yet."""
    changed: tuple[NodeChange, ...]
    """The same verdict for other reasons, or nothing certain any more: unhealthy, now unknown."""
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return not (
            self.worse or self.recovered or self.better or self.changed or self.only_before or self.only_after
        )


def diff(previous: Iterable[VerdictRow], current: Iterable[VerdictRow]) -> Difference:
    """From `previous` to `current`. A value that merely moved within the same finding is no change.

    A check that only one of the runs asked for makes its findings neither appear nor go: they were not
    looked for.
    """
    before = {row.node: row for row in previous}
    after = {row.node: row for row in current}
    changes = [_change(before[node], row) for node, row in after.items() if node in before]
    return Difference(
        worse=tuple(c for c in changes if c.worse),
        recovered=tuple(c for c in changes if c.better and c.after is Verdict.HEALTHY),
        better=tuple(c for c in changes if c.better and c.after is not Verdict.HEALTHY),
        changed=tuple(
            c
            for c in changes
            if not c.worse and not c.better and (c.appeared or c.gone or c.before is not c.after)
        ),
        only_before=tuple(node for node in before if node not in after),
        only_after=tuple(node for node in after if node not in before),
    )


def _change(before: VerdictRow, after: VerdictRow) -> NodeChange:
    old, new = _findings(before), _findings(after)
    return NodeChange(
        node=after.node,
        before=Verdict(before.verdict),
        after=Verdict(after.verdict),
        appeared=tuple(
            f for key, f in new.items() if _looked_for(f, before) and _rank(f) > _rank(old.get(key))
        ),
        gone=tuple(f for key, f in old.items() if _seen_again(f, after) and _rank(f) > _rank(new.get(key))),
    )


def _findings(row: VerdictRow) -> dict[Key, Finding]:
    """The worst finding about each thing."""
    found: dict[Key, Finding] = {}
    for data in row.findings:
        finding = finding_from_json(data)
        key = (finding.check, finding.metric, finding.device)
        if finding.outcome is not Outcome.NOT_APPLICABLE and _rank(finding) > _rank(found.get(key)):
            found[key] = finding
    return found


_RANK = {
    Outcome.UNSUPPORTED: 1,
    Outcome.WARN: 2,
    Outcome.UNKNOWN: 3,
    Outcome.TIMEOUT: 3,
    Outcome.FAIL: 4,
}


def _rank(finding: Finding | None) -> int:
    return 0 if finding is None else _RANK.get(finding.outcome, 0)


def _looked_for(finding: Finding, row: VerdictRow) -> bool:
    """Findings of the transport and the fleet belong to no check of a plan: every run looks for them."""
    if finding.check.startswith(("transport.", "agent.", "fleet.")):
        return True
    return row.checks.get(finding.check, "not_applicable") != "not_applicable"


_ANSWERS = (Outcome.PASS, Outcome.WARN, Outcome.FAIL)


def _seen_again(finding: Finding, row: VerdictRow) -> bool:
    """Whether the absence of `finding` from `row` means that it is over: its check measured something."""
    if finding.check.startswith(("transport.", "agent.")):
        return True
    if finding.check.startswith("fleet."):
        return any(outcome in _ANSWERS for outcome in row.checks.values())
    return row.checks.get(finding.check) in _ANSWERS
