"""What one node cannot tell: who is unlike its peers, and unlike the history of its kind. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from probes.baseline import Baseline, Unlearned, learn
from probes.catalogue import Catalogue
from probes.criteria import Rule, show
from probes.model import Finding, Outcome, Value
from probes.peers import Outlier, Sample, compare, is_number

KIND_CHECK = "fleet.kind"
"""The finding that a node, of which the inventory does not say what it is, is not what most others are."""

Measured = Mapping[str, Sequence[tuple[str | None, Value]]]
"""``family.check.metric`` -> (device, value), in the order in which they came."""


@dataclass(frozen=True, slots=True)
class Member:
    """One node that was probed, with what it measured of the metrics that are compared."""

    node: str
    sku: str | None
    measured: Measured
    declared: bool = True
    """The inventory says its SKU."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something about many nodes that accuses none of them."""

    message: str
    metric: str = ""
    """Full name."""
    sku: str | None = None


@dataclass(frozen=True)
class FleetResult:
    findings: Mapping[str, tuple[Finding, ...]] = field(default_factory=dict)
    """By node; nodes without any are absent."""
    notes: tuple[Note, ...] = ()


def compared_metrics(catalogue: Catalogue) -> frozenset[str]:
    """Full names of the metrics that peers or baselines judge, or that say which peers are alike: all that
    need be kept of a healthy node."""
    return frozenset(
        f"{check.name}.{name}"
        for check in catalogue
        for metric, spec in check.spec.metrics.items()
        if spec.peers is not None or spec.baseline is not None
        for name in (metric, spec.peers.alike if spec.peers else None)
        if name is not None
    )


def compare_peers(members: Iterable[Member], rules: Mapping[str, Rule]) -> FleetResult:
    """Findings against nodes that differ from their peers of the same SKU. `rules` by full name of the
    metric."""
    findings: dict[str, list[Finding]] = {}
    notes: list[Note] = []
    for sku, group in by_sku(members).items():
        uncompared = 0
        for name, rule in rules.items():
            if rule.peers is None:
                continue
            results = [compare(samples, rule.peers) for samples in _alike(group, rule)]
            uncompared += bool(results) and not any(result.compared for result in results)
            for result in results:
                if result.undecided:
                    notes.append(Note(f"{name}: {result.undecided}; nobody is accused", name, sku))
                for outlier in result.outliers:
                    findings.setdefault(outlier.node, []).append(_peer_finding(rule, outlier))
        if uncompared:
            nodes = f"{len(group)} node{'s' if len(group) != 1 else ''}"
            kind = f"SKU {sku}" if sku else "an unnamed SKU"
            notes.append(Note(f"{uncompared} metrics have too few peers among {nodes} of {kind}", sku=sku))
    return FleetResult({node: tuple(found) for node, found in findings.items()}, tuple(notes))


def _alike(group: Sequence[Member], rule: Rule) -> list[list[Sample]]:
    """The samples of one metric, apart by the value of the metric that `alike` names.

    A digest of results says nothing about nodes with another software stack. The other metric is that of the
    same device, else of the node; samples of nodes that did not report it are compared among themselves.
    """
    assert rule.peers is not None
    own = rule.name
    if rule.peers.alike is None:
        samples = [(m.node, device, value) for m in group for device, value in m.measured.get(own, ())]
        return [samples] if samples else []
    other = f"{rule.check}.{rule.peers.alike}"
    apart: dict[Value, list[Sample]] = {}
    for member in group:
        values = dict(member.measured.get(other, ()))
        for device, value in member.measured.get(own, ()):
            apart.setdefault(values.get(device, values.get(None)), []).append((member.node, device, value))
    return list(apart.values())


def compare_kinds(members: Sequence[Member]) -> FleetResult:
    """Findings against nodes whose SKU nobody declared and that show another one than most of those do.

    An accelerator node that lost all its devices looks like a node that never had any; its peers know better.
    """
    unsaid = [member for member in members if not member.declared]
    result = Counter(member.sku for member in unsaid).most_common(1)
    if len(unsaid) < 3 or not result or 2 * result[0][1] <= len(unsaid):
        return FleetResult()
    usual, count = result[0]
    shown = usual or "without accelerators"
    findings = {
        member.node: (
            Finding(
                KIND_CHECK,
                Outcome.WARN,
                f"shows {member.sku or 'no accelerators'}, most nodes are {shown}",
                value=member.sku,
                limit=f"== {shown}",
                source="peers",
                reference=f"{count} of {len(unsaid)} nodes without a SKU in the inventory",
                action="Name its SKU in the inventory. If it is like the others, it lost accelerators.",
            ),
        )
        for member in unsaid
        if member.sku != usual
    }
    return FleetResult(findings)


BaselineKey = tuple[str, str]
"""SKU and full name of the metric."""


def learn_baselines(
    history: Mapping[BaselineKey, Mapping[str, Sequence[float]]], rules: Mapping[str, Rule]
) -> tuple[dict[BaselineKey, Baseline], tuple[Note, ...]]:
    """Baselines from (SKU, metric) -> node -> past values; notes say what could not be learned."""
    learned: dict[BaselineKey, Baseline] = {}
    notes: list[Note] = []
    for (sku, name), nodes in history.items():
        rule = rules.get(name)
        if rule is None or rule.baseline is None:
            continue
        match learn(nodes, rule.baseline):
            case Baseline() as baseline:
                learned[sku, name] = baseline
            case Unlearned(reason):
                notes.append(Note(f"{name}: no baseline yet: {reason}", name, sku))
    return learned, tuple(notes)


def compare_baselines(
    members: Iterable[Member], baselines: Mapping[BaselineKey, Baseline], rules: Mapping[str, Rule]
) -> FleetResult:
    """Findings against values that are unlike the history of their SKU."""
    findings: dict[str, list[Finding]] = {}
    for member in members:
        for name, values in member.measured.items():
            baseline = baselines.get((member.sku or "", name))
            if baseline is None:
                continue
            rule = rules[name]
            for device, value in values:
                if is_number(value) and isinstance(value, int | float) and not baseline.accepts(float(value)):
                    findings.setdefault(member.node, []).append(
                        _baseline_finding(rule, baseline, device, float(value))
                    )
    return FleetResult({node: tuple(found) for node, found in findings.items()})


def by_sku(members: Iterable[Member]) -> dict[str | None, list[Member]]:
    groups: dict[str | None, list[Member]] = {}
    for member in members:
        groups.setdefault(member.sku, []).append(member)
    return groups


def _peer_finding(rule: Rule, outlier: Outlier) -> Finding:
    assert rule.peers is not None
    return Finding(
        check=rule.check,
        outcome=Outcome(rule.peers.outcome),
        message=f"{rule.metric} is {show(outlier.value, rule.unit)}, unlike its peers ({outlier.reference})",
        metric=rule.metric,
        device=outlier.device,
        value=outlier.value,
        unit=rule.unit,
        limit=outlier.limit,
        source="peers",
        reference=outlier.reference,
        action=rule.action,
    )


def _baseline_finding(rule: Rule, baseline: Baseline, device: str | None, value: float) -> Finding:
    return Finding(
        check=rule.check,
        outcome=Outcome(baseline.spec.outcome),
        message=f"{rule.metric} is {show(value, rule.unit)}, {baseline.spec.worse} than this SKU's history",
        metric=rule.metric,
        device=device,
        value=value,
        unit=rule.unit,
        limit=baseline.limit,
        source="baseline",
        reference=baseline.describe(value),
        action=rule.action,
    )
