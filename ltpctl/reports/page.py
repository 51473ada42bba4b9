"""Validation results as one self-contained HTML page: findings, and a heat map of nodes against checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from inventory.fleet import fold
from ltpctl.console import clean
from ltpctl.reports.folding import RANK, groups
from probes.model import NodeVerdict, Outcome

_MARK = {
    Outcome.PASS: "·",
    Outcome.WARN: "!",
    Outcome.FAIL: "✕",
    Outcome.UNKNOWN: "?",
    Outcome.TIMEOUT: "◷",
    Outcome.UNSUPPORTED: "–",
    Outcome.NOT_APPLICABLE: "",
}
"""A sign beside each colour: the page must read without colours too."""


@dataclass(frozen=True)
class Row:
    """One row of the heat map: nodes whose checks all came out alike."""

    nodes: str
    count: int
    verdict: str
    cells: tuple[Outcome, ...]


def page(title: str, verdicts: Sequence[NodeVerdict], facts: Mapping[str, str]) -> str:
    """The page. `facts` is shown in its head: when, plan, inventory, duration."""
    checks = list(dict.fromkeys(check for verdict in verdicts for check in verdict.checks))
    families: dict[str, list[str]] = {}
    for check in checks:
        families.setdefault(check.partition(".")[0], []).append(check)
    ordered = [check for members in families.values() for check in members]
    environment = Environment(
        loader=PackageLoader("ltpctl.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clean"] = clean
    template = environment.get_template("validation.html.j2")
    counts = {str(v): sum(1 for one in verdicts if one.verdict is v) for v in RANK}
    return template.render(
        title=title,
        facts=facts,
        counts=counts,
        total=len(verdicts),
        groups=[(fold(g.nodes), len(g.nodes), g) for g in groups(verdicts)],
        families=families,
        checks=ordered,
        rows=_rows(verdicts, ordered),
        mark=_MARK,
        outcomes=list(Outcome),
    )


def _rows(verdicts: Sequence[NodeVerdict], checks: Sequence[str]) -> list[Row]:
    alike: dict[tuple[object, ...], list[NodeVerdict]] = {}
    for verdict in verdicts:
        cells = tuple(verdict.checks.get(check, Outcome.NOT_APPLICABLE) for check in checks)
        alike.setdefault((verdict.verdict, cells), []).append(verdict)
    rows = [
        Row(fold([v.node for v in same]), len(same), str(same[0].verdict), tuple(cells))  # type: ignore[arg-type]
        for (_, cells), same in alike.items()
    ]
    order = {str(verdict): rank for verdict, rank in RANK.items()}
    return sorted(rows, key=lambda row: (order[row.verdict], row.count, row.nodes))
