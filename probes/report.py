"""A validation's result as others read it: the ``ltpctl/validate/1`` document and the ledger's rows. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inventory.ledger.records import MeasurementRow, VerdictRow
from probes.model import Finding, NodeVerdict, Outcome, Value, Verdict

if TYPE_CHECKING:
    from probes.profiles import RuleBook
    from probes.validate import ValidationResult

SCHEMA = "ltpctl/validate/1"

SCHEMA_FILE = Path(__file__).parent / "schemas" / "validate-1.json"
"""JSON Schema (draft 2020-12) of what :func:`to_json` gives."""


def to_json(result: ValidationResult) -> dict[str, Any]:
    """The ``ltpctl/validate/1`` document."""
    return {
        "schema": SCHEMA,
        "plan": result.plan.level,
        "checks": list(result.plan.names),
        "started": result.started,
        "seconds": round(result.seconds, 3),
        "interrupted": result.interrupted,
        "nodes": [node_json(verdict) for verdict in result.verdicts],
        "notes": [{"message": n.message, "metric": n.metric or None, "sku": n.sku} for n in result.notes],
        "summary": {verdict.value: count for verdict, count in result.summary.items()},
    }


def node_json(verdict: NodeVerdict) -> dict[str, Any]:
    """One node of the document. Checks that were not run on it are under ``skipped``, not among the
    findings."""
    return {
        "node": verdict.node,
        "verdict": verdict.verdict.value,
        "sku": verdict.sku,
        "findings": [finding_json(f) for f in verdict.findings if f.outcome is not Outcome.NOT_APPLICABLE],
        "skipped": [
            {"check": f.check, "reason": f.message}
            for f in verdict.findings
            if f.outcome is Outcome.NOT_APPLICABLE
        ],
        "checks": {check: outcome.value for check, outcome in verdict.checks.items()},
        "seconds": round(verdict.seconds, 3),
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "outcome": finding.outcome.value,
        "metric": finding.metric,
        "device": finding.device,
        "value": _plain(finding.value),
        "unit": finding.unit,
        "limit": finding.limit,
        "source": finding.source,
        "reference": finding.reference,
        "message": finding.message,
        "action": finding.action,
        "evidence": list(finding.evidence),
    }


def finding_from_json(data: Mapping[str, Any]) -> Finding:
    """The finding that :func:`finding_json` made `data` of; a field of a later version is ignored."""
    return Finding(
        check=str(data["check"]),
        outcome=Outcome(data["outcome"]),
        message=str(data.get("message", "")),
        metric=data.get("metric"),
        device=data.get("device"),
        value=data.get("value"),
        unit=str(data.get("unit", "")),
        limit=str(data.get("limit", "")),
        source=str(data.get("source", "")),
        reference=str(data.get("reference", "")),
        action=str(data.get("action", "")),
        evidence=tuple(data.get("evidence", ())),
    )


def verdict_row(verdict: NodeVerdict) -> VerdictRow:
    """What the ledger keeps of a verdict; skipped checks are among its findings, as ``not_applicable``."""
    return VerdictRow(
        node=verdict.node,
        verdict=verdict.verdict.value,
        sku=verdict.sku,
        findings=[finding_json(finding) for finding in verdict.findings],
        checks={check: outcome.value for check, outcome in verdict.checks.items()},
        seconds=verdict.seconds,
    )


def verdict_from_row(row: VerdictRow) -> NodeVerdict:
    """The verdict that the ledger kept, e.g. to show an earlier run."""
    return NodeVerdict(
        node=row.node,
        verdict=Verdict(row.verdict),
        findings=tuple(finding_from_json(finding) for finding in row.findings),
        checks={check: Outcome(outcome) for check, outcome in row.checks.items()},
        sku=row.sku,
        seconds=row.seconds,
    )


def measurement_rows(result: ValidationResult, rules: RuleBook) -> Iterator[MeasurementRow]:
    """The numbers from which baselines are learned."""
    wanted = {name for name, rule in rules.by_metric().items() if rule.baseline is not None}
    for member in result.members:
        for name, values in member.measured.items():
            if name not in wanted:
                continue
            for device, value in values:
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    yield MeasurementRow(member.node, name, float(value), device)


def schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    loaded: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return loaded


def _plain(value: Value) -> Value:
    """JSON has no NaN; what is not a number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
