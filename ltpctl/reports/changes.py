"""What changed between two validations, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence

from inventory.fleet import fold
from inventory.ledger.records import Run
from ltpctl.console import Output
from ltpctl.times import shown
from probes.difference import Difference, NodeChange
from probes.model import Finding
from probes.report import finding_json

SCHEMA = "ltpctl/diff/1"


def show_changes(out: Output, before: Run, after: Run, difference: Difference) -> None:
    """Print the difference."""
    sections = (
        ("worse", difference.worse),
        ("changed", difference.changed),
        ("better", difference.better),
        ("recovered", difference.recovered),
    )
    if out.json:
        document: dict[str, object] = {"schema": SCHEMA, "before": before.id, "after": after.id}
        document |= {name: [_json(change) for change in changes] for name, changes in sections}
        document |= {"only_before": list(difference.only_before), "only_after": list(difference.only_after)}
        out.document(document)
        return
    out.note(
        f"from {before.id} ({shown(before.started)}, {before.plan}) "
        f"to {after.id} ({shown(after.started)}, {after.plan})"
    )
    if difference.nothing:
        out.line("nothing changed")
        return
    rows = [row for name, changes in sections for row in _rows(name, changes)]
    if rows:
        out.table(
            ("nodes", "change", "verdict", "finding"),
            rows,
            wrap=frozenset({"nodes", "finding"}),
            style_by=("verdict",),
        )
    for text, names in (
        ("only in the earlier run", difference.only_before),
        ("only in the later run", difference.only_after),
    ):
        if names:
            out.line(f"{fold(list(names))}: {text}")


def _rows(name: str, changes: Sequence[NodeChange]) -> list[tuple[object, ...]]:
    """Nodes that changed alike on one row."""
    alike: dict[tuple[object, ...], list[NodeChange]] = {}
    for change in changes:
        shape = (change.before, change.after, _about(change.appeared), _about(change.gone))
        alike.setdefault(shape, []).append(change)
    rows: list[tuple[object, ...]] = []
    for same in alike.values():
        first = same[0]
        lines = [f"+ {f.check}: {f.message}" for f in first.appeared] + [
            f"- {f.check}: {f.message}" for f in first.gone
        ]
        was = f"{name}, was {first.before}" if first.before is not first.after else name
        rows.append((fold([c.node for c in same]), was, first.after, "\n".join(lines)))
    return rows


def _about(findings: Sequence[Finding]) -> tuple[object, ...]:
    return tuple((f.check, f.metric, f.device, f.outcome) for f in findings)


def _json(change: NodeChange) -> dict[str, object]:
    return {
        "node": change.node,
        "before": str(change.before),
        "after": str(change.after),
        "appeared": [finding_json(f) for f in change.appeared],
        "gone": [finding_json(f) for f in change.gone],
    }
