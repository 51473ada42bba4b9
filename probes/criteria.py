"""Absolute limits: what one node's records say by themselves, whatever its peers and its past show.

Pure. :func:`compile_rules` once per SKU and set of inventory limits, :func:`judge` for every node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from probes.catalogue import BaselineSpec, Catalogue, Check, MetricSpec, PeerSpec
from probes.limits import Demand, Limit
from probes.model import CheckRecord, Finding, Measure, Outcome, Status, Value

EVIDENCE_LINES = 20
"""Most that a finding shows of what the node's tools printed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one metric is judged on nodes of one kind."""

    check: str
    metric: str
    unit: str
    action: str
    what: str
    demand: Demand | None = None
    peers: PeerSpec | None = None
    baseline: BaselineSpec | None = None

    @property
    def name(self) -> str:
        return f"{self.check}.{self.metric}"


@dataclass(frozen=True, slots=True)
class CheckRules:
    """How one check is judged on nodes of one kind."""

    check: str
    fix: str
    rules: Mapping[str, Rule]
    """By the metric's last name; every metric of the check is there."""
    essential: bool = False
    needs: str = ""
    demanded: tuple[Rule, ...] = field(default=())
    """Rules whose limit was made for this SKU or node: their metrics must be reported."""
    limited: tuple[Rule, ...] = field(default=())
    """Rules with any limit, but for those whose value need not be reported."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How nodes of one kind are judged."""

    checks: Mapping[str, CheckRules]
    expects: frozenset[str] = frozenset()
    """Vendors, and ``accelerator``, that nodes of this kind must show."""
    expected_by: str = ""
    """Who expects them: ``sku:h100``."""

    essential: frozenset[str] = frozenset()
    """Checks without whose answer nothing is known about the node."""

    def rule(self, check: str, metric: str) -> Rule | None:
        found = self.checks.get(check)
        return found.rules.get(metric) if found else None


@dataclass(frozen=True, slots=True)
class Judged:
    """One record, judged."""

    outcome: Outcome
    findings: tuple[Finding, ...] = ()


def compile_rules(
    catalogue: Catalogue,
    overlays: Iterable[Mapping[str, Demand]] = (),
    essential: Iterable[str] = (),
    expects: Iterable[str] = (),
    expected_by: str = "",
) -> Rules:
    """Rules from the catalogue's defaults and `overlays` (``family.check.metric`` -> demand); later ones win.

    A demand of an overlay replaces the whole demand under it: a SKU that says only ``fail`` has no ``warn``.
    """
    final: dict[str, Demand] = {}
    for overlay in overlays:
        final.update(overlay)
    also_essential = frozenset(essential)
    checks = {check.name: _compile(check, final, also_essential) for check in catalogue}
    return Rules(
        checks,
        expects=frozenset(expects),
        expected_by=expected_by,
        essential=frozenset(name for name, check in checks.items() if check.essential),
    )


def _compile(check: Check, overlay: Mapping[str, Demand], essential: frozenset[str]) -> CheckRules:
    rules = {
        metric: _rule(check, metric, spec, overlay.get(f"{check.name}.{metric}", check.demands.get(metric)))
        for metric, spec in check.spec.metrics.items()
    }
    demanded = tuple(r for r in rules.values() if r.demand is not None and r.demand.explicit)
    return CheckRules(
        check=check.name,
        fix=check.spec.fix,
        rules=rules,
        essential=check.spec.essential
        or check.name in essential
        # Whoever wrote a limit for this kind of node did not mean "if it can be measured": a node without its
        # vendor's tool must not read as healthy.
        or bool(demanded),
        needs=check.spec.needs,
        demanded=demanded,
        limited=tuple(r for r in rules.values() if r.demand is not None and r.demand.required),
    )


def _rule(check: Check, metric: str, spec: MetricSpec, demand: Demand | None) -> Rule:
    return Rule(
        check=check.name,
        metric=metric,
        unit=spec.unit,
        action=spec.action or check.spec.fix,
        what=spec.what,
        demand=demand,
        peers=spec.peers,
        baseline=spec.baseline,
    )


def judge(rules: Rules, check: str, record: CheckRecord | None) -> Judged:
    """What `record` says about its node; None stands for a record that never came.

    A check that did not answer is a finding of its own kind.
    """
    check_rules = rules.checks[check]
    if record is None:
        return _single(check_rules, Outcome.UNKNOWN, _NO_RECORD)
    match record.status:
        case Status.ANSWERED:
            return _judge_measures(check_rules, record)
        case Status.NOT_APPLICABLE:
            return _not_applicable(rules, check_rules, record)
        case Status.UNSUPPORTED:
            why = record.detail or "the node cannot answer it"
            if check_rules.essential:
                return _single(
                    check_rules, Outcome.UNKNOWN, f"must be known here and cannot be: {why}", record
                )
            return _single(check_rules, Outcome.UNSUPPORTED, why, record)
        case Status.TIMEOUT:
            message = record.detail or f"did not end within its limit ({record.seconds:.1f} s)"
            return _single(check_rules, Outcome.TIMEOUT, message, record)
        case Status.ERROR:
            message = f"could not be carried out: {record.detail or 'no reason given'}"
            return _single(check_rules, Outcome.UNKNOWN, message, record)
        case Status.MISSING:
            return _single(check_rules, Outcome.UNKNOWN, record.detail or _NO_RECORD, record)


_NO_RECORD = "gave no answer: the agent or the connection ended before it"


_ADVICE = {
    Outcome.TIMEOUT: "Run its tool on the node by hand: what hangs waits for a driver, device or disk.",
    Outcome.UNKNOWN: "See the message and --verbose; 'ltpctl validate explain' tells how the check looks.",
}
"""What to do where nothing was measured: the check's own advice is for a limit that was missed."""


def _single(rules: CheckRules, outcome: Outcome, message: str, record: CheckRecord | None = None) -> Judged:
    action = _ADVICE.get(outcome, "")
    evidence = record.evidence[:EVIDENCE_LINES] if record else ()
    return Judged(outcome, (Finding(rules.check, outcome, message, action=action, evidence=evidence),))


def _not_applicable(rules: Rules, check: CheckRules, record: CheckRecord) -> Judged:
    """Devices that must be there and are not do not make their checks superfluous."""
    if check.needs not in rules.expects:
        return Judged(Outcome.NOT_APPLICABLE)
    device = "accelerator" if check.needs == "accelerator" else f"{check.needs} accelerator"
    message = f"the node shows no {device}, which {rules.expected_by} says it has"
    return _single(check, Outcome.UNKNOWN, message, record)


def _judge_measures(rules: CheckRules, record: CheckRecord) -> Judged:
    findings: list[Finding] = []
    by_metric = rules.rules
    reported: set[str] = set()
    for measure in record.measures:
        rule = by_metric.get(measure.metric)
        if rule is None:
            continue
        reported.add(measure.metric)
        if rule.demand is not None and (found := _judge_value(rule, rule.demand, measure, record)):
            findings.append(found)
    for rule in rules.demanded:
        findings.extend(_absent(rule, record, reported))
    if not any(rule.metric in reported for rule in rules.limited) and not findings:
        findings.extend(_nothing_to_judge(rules, record))
    if not findings:
        return Judged(Outcome.PASS)
    return Judged(min((f.outcome for f in findings), key=SEVERITY.__getitem__), tuple(findings))


SEVERITY = {
    Outcome.FAIL: 0,
    Outcome.TIMEOUT: 1,
    Outcome.UNKNOWN: 2,
    Outcome.WARN: 3,
    Outcome.UNSUPPORTED: 4,
    Outcome.NOT_APPLICABLE: 5,
    Outcome.PASS: 6,
}
"""Worst first."""


def _judge_value(rule: Rule, demand: Demand, measure: Measure, record: CheckRecord) -> Finding | None:
    """The finding that `measure` is, if its demand does not hold for certain."""
    fail_holds = True if demand.fail is None else demand.fail.holds(measure.value)
    if fail_holds is False:
        assert demand.fail is not None
        return _finding(rule, demand, measure, record, outcome=Outcome.FAIL, limit=demand.fail)
    warn_holds = True if demand.warn is None else demand.warn.holds(measure.value)
    if fail_holds is None or warn_holds is None:
        limit = demand.fail if fail_holds is None else demand.warn
        assert limit is not None
        return _finding(rule, demand, measure, record, outcome=Outcome.UNKNOWN, limit=limit)
    if warn_holds is False:
        assert demand.warn is not None
        return _finding(rule, demand, measure, record, outcome=Outcome.WARN, limit=demand.warn)
    return None


def _finding(
    rule: Rule, demand: Demand, measure: Measure, record: CheckRecord, *, outcome: Outcome, limit: Limit
) -> Finding:
    shown = show(measure.value, rule.unit)
    message = (
        f"{rule.metric} is {shown}, which cannot be held against {limit.text}"
        if outcome is Outcome.UNKNOWN
        else f"{rule.metric} is {shown}, expected {limit.text}"
    )
    return Finding(
        check=rule.check,
        outcome=outcome,
        message=message,
        metric=rule.metric,
        device=measure.device,
        value=measure.value,
        unit=rule.unit,
        limit=limit.text,
        source=demand.source,
        reference=demand.reference,
        action=rule.action,
        evidence=record.evidence[:EVIDENCE_LINES],
    )


def _absent(rule: Rule, record: CheckRecord, reported: set[str]) -> list[Finding]:
    """Findings for a demanded metric that is lacking: for the node, or for devices that others tell of."""
    lacking: list[str | None] = [None]
    if rule.metric in reported:
        devices: dict[str, set[str | None]] = {}
        for measure in record.measures:
            devices.setdefault(measure.metric, set()).add(measure.device)
        holders = devices[rule.metric]
        # Metrics without a device in common are about things of another kind: links beside accelerators, say.
        alike = [seen for seen in devices.values() if not seen.isdisjoint(holders)]
        lacking = [] if None in holders else sorted(set().union(*alike) - holders, key=str)
    assert rule.demand is not None
    limit = rule.demand.fail or rule.demand.warn
    return [
        Finding(
            check=rule.check,
            outcome=Outcome.UNKNOWN,
            message=f"{rule.metric} was not reported, expected {limit.text if limit else 'a value'}",
            metric=rule.metric,
            device=device,
            unit=rule.unit,
            limit=limit.text if limit else "",
            source=rule.demand.source,
            reference=rule.demand.reference,
            action=rule.action,
            evidence=record.evidence[:EVIDENCE_LINES],
        )
        for device in lacking
    ]


def _nothing_to_judge(rules: CheckRules, record: CheckRecord) -> list[Finding]:
    """An answer without any of the values that the check is judged by is no pass."""
    if rules.limited:
        names = ", ".join(rule.metric for rule in rules.limited)
        message = f"answered, but reported none of the values that it is judged by ({names})"
    elif not record.measures:
        message = "answered, but reported no value"
    else:
        return []
    return [
        Finding(
            rules.check, Outcome.UNKNOWN, message, action=rules.fix, evidence=record.evidence[:EVIDENCE_LINES]
        )
    ]


def show(value: Value, unit: str = "") -> str:
    """A value as a person reads it."""
    match value:
        case None:
            return "not known"
        case bool():
            return "true" if value else "false"
        case float():
            text = f"{value:.6g}"
        case str():
            plain = value != "" and value == value.strip() and value.isprintable()
            return value if plain else repr(value)
        case _:
            text = str(value)
    # "is 1 count" says no more than "is 1".
    return text if unit in ("", "count") else f"{text} {unit}"
