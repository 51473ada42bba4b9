"""Everything about one check, for people and programs."""

from __future__ import annotations

import dataclasses

from ltpctl.console import Output
from probes.explain import Explanation, MetricExplanation

SCHEMA = "ltpctl/explain/1"


def show_explanation(out: Output, explanation: Explanation) -> None:
    if out.json:
        out.document({"schema": SCHEMA, **dataclasses.asdict(explanation)})
        return
    out.line(explanation.check, "bold")
    out.line(_one_line(explanation.what))
    out.line()
    out.line(f"Why    {_one_line(explanation.why)}")
    out.line(f"Fix    {_one_line(explanation.fix)}")
    facts = [f"plan {explanation.level}", f"time limit {explanation.timeout:g} s"]
    facts += ["loads the machine"] if explanation.loads else []
    facts += [f"needs {explanation.needs}"] if explanation.needs else []
    facts += [f"tags {', '.join(explanation.tags)}"] if explanation.tags else []
    facts += [f"essential for {', '.join(explanation.essential_for)}"] if explanation.essential_for else []
    facts += [f"left out on {', '.join(explanation.skipped_on)}"] if explanation.skipped_on else []
    out.line(f"How    {'; '.join(facts)}")
    out.line(f"       by {explanation.how} ({explanation.origin})")
    out.line()
    out.table(
        ("metric", "unit", "judged by", "meaning"),
        ((m.metric, m.unit, _judged(m), _one_line(m.what)) for m in explanation.metrics),
        wrap=frozenset({"judged by", "meaning"}),
    )
    sourced = [(m, limit) for m in explanation.metrics for limit in m.limits if limit.reference or limit.sku]
    if sourced:
        out.line()
        out.table(
            ("metric", "sku", "limit", "where it comes from"),
            (
                (
                    m.metric,
                    limit.sku or "any",
                    limit.fail or f"warns: {limit.warn}",
                    _one_line(limit.reference),
                )
                for m, limit in sourced
            ),
            wrap=frozenset({"where it comes from"}),
        )


def _judged(metric: MetricExplanation) -> str:
    parts: list[str] = []
    for limit in metric.limits:
        if limit.sku is None:
            parts += [f"fails unless {limit.fail}"] if limit.fail else []
            parts += [f"warns unless {limit.warn}"] if limit.warn else []
    if own := [limit.sku for limit in metric.limits if limit.sku]:
        parts.append(f"its own limit on {', '.join(own)}")
    if metric.peers:
        how = "majority of peers" if metric.peers.rule == "majority" else f"peers within z {metric.peers.z:g}"
        parts.append(how)
    if metric.baseline:
        parts.append("history of its SKU")
    return "; ".join(parts) or "shown only"


def _one_line(text: str) -> str:
    return " ".join(text.split())
