"""A validation's result on a terminal: findings first, equal nodes on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, zip_longest

from inventory.fleet import fold
from ltpctl.console import Output
from ltpctl.reports.folding import QUIET, Group, groups
from ltpctl.times import duration
from probes.model import Verdict
from probes.validate import ValidationResult


def show_verdicts(
    out: Output, result: ValidationResult, run_id: str | None, moved: list[tuple[str, str, str]]
) -> None:
    """The table, the counts, and what became of the nodes: (node, from, to) for each that was moved."""
    folded = groups(result.verdicts, everything=out.verbose)
    rows = (row for group in folded for row in _rows(group, out.verbose))
    columns: tuple[str, ...] = ("nodes", "verdict", "outcome", "check", "finding")
    if out.width < NARROW:
        columns = ("nodes", "verdict", "finding")
        rows = ((n, v, f"{o} {check}\n{text}" if check else text) for n, v, o, check, text in rows)
    out.table(
        columns,
        rows,
        wrap=frozenset({"nodes", "finding"}),
        style_by=("verdict", "outcome"),
        widest={"nodes": NODES_WIDTH},
    )
    out.line()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in result.summary.items() if count)
    out.line(f"{counts}; {result.plan} in {duration(result.seconds)}")
    hidden = sum(1 for v in result.verdicts for f in v.findings if f.outcome in QUIET)
    if hidden and not out.verbose:
        out.note(
            f"{hidden} checks could not be answered and do not count (tool or device absent); "
            "--verbose shows them"
        )
    for note in result.notes:
        out.detail(note.message)
    if moved:
        by_way: dict[tuple[str, str], list[str]] = {}
        for node, source, target in moved:
            by_way.setdefault((source, target), []).append(node)
        for (source, target), names in by_way.items():
            out.line(f"{fold(names)}: {source} -> {target}")
    if result.interrupted:
        out.note("interrupted: what is shown is what was known by then; nothing was moved")
    if run_id:
        out.note(f"run {run_id}; compare with the one before: ltpctl validate diff")


NODES_WIDTH = 30
NARROW = 120
"""Under this many characters in a line, outcome and check stand above the finding instead of beside it."""
SAME_CHECK = 4
"""Findings of one check that a group of nodes shows on a terminal; the rest are counted."""


def _rows(group: Group, everything: bool) -> Iterator[tuple[object, ...]]:
    head = (_broken(fold(list(group.nodes))), str(group.verdict))
    if not group.lines:
        nothing = "no check of this plan applies here" if group.verdict is Verdict.UNKNOWN else ""
        yield (*head, "", "", nothing)
    for check, lines in groupby(group.lines, key=lambda line: line.check):
        same = list(lines)
        shown = same if everything else same[:SAME_CHECK]
        for line, following in zip_longest(shown, shown[1:]):
            text = line.text
            if following is None and len(same) > len(shown):
                text += f"\n({len(same) - len(shown)} more of {check}: see --verbose or --html)"
            # Said once, below the last of the findings that it mends.
            if line.action and (following is None or following.action != line.action):
                text += f"\n-> {line.action}"
            yield (*head, line.outcome, line.check, text)
            head = ("", "")


def _broken(nodes: str) -> str:
    """A long node set on several lines, broken between its ranges."""
    lines = [""]
    for part in re.split(r"(?<=,)", nodes):
        if lines[-1] and len(lines[-1]) + len(part) > NODES_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
