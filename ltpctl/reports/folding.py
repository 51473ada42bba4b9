"""Nodes that say the same are shown once: ``node[001-062]  healthy``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from probes.model import Finding, NodeVerdict, Outcome, Verdict

RANK = {Verdict.UNHEALTHY: 0, Verdict.UNKNOWN: 1, Verdict.DEGRADED: 2, Verdict.HEALTHY: 3}
"""What a person must see first."""

QUIET = (Outcome.UNSUPPORTED, Outcome.NOT_APPLICABLE)
"""Outcomes that change no verdict: shown on request."""


@dataclass(frozen=True)
class Line:
    """One finding as a group of nodes shares it."""

    outcome: Outcome
    check: str
    text: str
    action: str


@dataclass(frozen=True)
class Group:
    nodes: tuple[str, ...]
    verdict: Verdict
    lines: tuple[Line, ...]


def groups(verdicts: Iterable[NodeVerdict], everything: bool = False) -> list[Group]:
    """Fold nodes of equal verdict and equal findings (values may differ), worst first, larger groups later.

    `everything` keeps findings that change no verdict.
    """
    alike: dict[object, list[tuple[NodeVerdict, list[Finding]]]] = {}
    for verdict in verdicts:
        shown = [f for f in verdict.findings if everything or f.outcome not in QUIET]
        shape = (
            verdict.verdict,
            tuple(dict.fromkeys((f.check, f.metric, f.outcome, f.limit, f.source) for f in shown)),
        )
        alike.setdefault(shape, []).append((verdict, shown))
    folded = [
        Group(tuple(v.node for v, _ in members), members[0][0].verdict, tuple(_lines(members)))
        for members in alike.values()
    ]
    return sorted(folded, key=lambda g: (RANK[g.verdict], len(g.nodes), g.nodes))


def _lines(members: list[tuple[NodeVerdict, list[Finding]]]) -> Iterable[Line]:
    seen: dict[tuple[object, ...], list[tuple[str, Finding]]] = {}
    for verdict, findings in members:
        for finding in findings:
            key = (finding.check, finding.metric, finding.outcome, finding.limit, finding.source)
            seen.setdefault(key, []).append((verdict.node, finding))
    for same in seen.values():
        node, first = same[0]
        text = first.message
        if first.device is not None and len(members) == 1:
            devices = list(dict.fromkeys(f.device for _, f in same if f.device is not None))
            text = f"{_listed('device', devices)}: {text}"
        if len({f.message for _, f in same}) > 1:
            text += f" (on {node}; {len(same) - 1} more alike)"
        yield Line(first.outcome, first.check, text, "" if first.outcome in QUIET else first.action)


def _listed(word: str, names: list[str]) -> str:
    head = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{word}{'s' if len(names) > 1 else ''} {head}"
