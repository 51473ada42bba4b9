"""Nodes that say the same are shown once: ``node[001-062]  healthy``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from probes.model import Finding, NodeVerdict, Outcome, Verdict

RANK = {Verdict.UNHEALTHY: 0, Verdict.UNKNOWN: 1, Verdict.DEGRADED: 2, Verdict.HEALTHY: 3}
"""What a person must see first."""

QUIET = (Outcome.UNSUPPORTED, Outcome.NOT_APPLICABLE)
"""Outcomes that change no verdict: shown on request."""


COMPARED = ("peers", "baseline")
"""Sources of limits that differ from device to device, and whose messages say where they come from."""


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
        shape = (verdict.verdict, tuple(dict.fromkeys(map(_about, shown))))
        alike.setdefault(shape, []).append((verdict, shown))
    folded = [
        Group(tuple(v.node for v, _ in members), members[0][0].verdict, tuple(_lines(members)))
        for members in alike.values()
    ]
    return sorted(folded, key=lambda g: (RANK[g.verdict], len(g.nodes), g.nodes))


def _about(finding: Finding) -> tuple[object, ...]:
    """What makes two findings the same story. A limit that peers or history set differs with the device."""
    limit = "" if finding.source in COMPARED else finding.limit
    # Without a metric the message is all there is; its numbers (addresses, seconds) are the node's own.
    told = "" if finding.metric else _NUMBERS.sub("#", finding.message)
    return (finding.check, finding.metric, finding.outcome, limit, finding.source, finding.action, told)


_NUMBERS = re.compile(r"[0-9]+(\.[0-9]+)*")


def _lines(members: list[tuple[NodeVerdict, list[Finding]]]) -> Iterable[Line]:
    stories: dict[tuple[object, ...], list[tuple[str, Finding]]] = {}
    for verdict, findings in members:
        for finding in findings:
            stories.setdefault(_about(finding), []).append((verdict.node, finding))
    for story in stories.values():
        node, first = story[0]
        # On one line: what a node says could otherwise write lines of its own, advice among them.
        text = " ".join(first.message.splitlines())
        if first.limit and first.metric and first.source not in COMPARED:
            text += f" ({first.source})"
        devices = list(dict.fromkeys(f.device for _, f in story if f.device is not None))
        if devices and len(members) == 1:
            text = f"{_listed(devices)}: {text}"
        if len({f.message for _, f in story}) > 1:
            where = f"on {node}" if len(members) > 1 else f"on device {first.device}"
            text += f" ({where}; the others alike)"
        yield Line(first.outcome, first.check, text, "" if first.outcome in QUIET else first.action)


def _listed(devices: list[str]) -> str:
    """``device 3``, ``devices 0-7``, ``devices mlx5_0, mlx5_3``; more than eight are counted."""
    if len(devices) == 1:
        return f"device {devices[0]}"
    numbers = [int(d) for d in devices if d.isdecimal()]
    if len(numbers) == len(devices) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"devices {devices[0]}-{devices[-1]}"
    more = f" and {len(devices) - 8} more" if len(devices) > 8 else ""
    return f"devices {', '.join(devices[:8])}{more}"
