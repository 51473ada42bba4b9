"""Everything there is to know about one check, for a person. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from inventory.errors import UsageError
from probes.catalogue import BaselineSpec, Catalogue, Check, PeerSpec
from probes.limits import Demand
from probes.profiles import Profiles


@dataclass(frozen=True, slots=True)
class LimitFor:
    """The limits of one metric on one SKU; ``sku`` None stands for every SKU that is not named."""

    sku: str | None
    fail: str
    warn: str
    source: str
    reference: str


@dataclass(frozen=True, slots=True)
class MetricExplanation:
    metric: str
    what: str
    unit: str
    action: str
    counter: bool
    limits: tuple[LimitFor, ...]
    peers: PeerSpec | None
    baseline: BaselineSpec | None


@dataclass(frozen=True, slots=True)
class Explanation:
    check: str
    what: str
    why: str
    fix: str
    level: str
    tags: tuple[str, ...]
    timeout: float
    loads: bool
    needs: str
    origin: str
    how: str
    """The command, the file or the function that looks."""
    essential_for: tuple[str, ...]
    """SKUs whose nodes are unknown without it; ``all`` for every node."""
    skipped_on: tuple[str, ...]
    metrics: tuple[MetricExplanation, ...]


BESIDE = {
    "transport": "how reaching the node or its command ended; the finding says what to do, "
    "docs/transport.md has the phases and their limits",
    "agent": "how the probe program fared on the node; the finding says what to do, see docs/criteria.md",
    "fleet": "a comparison of the node with the inventory and the other nodes; see docs/criteria.md",
    "host.clock": "the node's clock against the controller's: more than 1 s off is a warning, "
    "more than 5 s a failure; look at its chronyd or ntpd",
}
"""What findings name that no check makes, by family or name."""


def explain(name: str, catalogue: Catalogue, profiles: Profiles) -> Explanation:
    """What the check `name` looks at, why, its limits on every SKU with their sources, and what to do.

    Raises UsageError, with the nearest names, if there is no such check.
    """
    if name not in catalogue.checks and (beside := BESIDE.get(name) or BESIDE.get(name.partition(".")[0])):
        raise UsageError(f"'{name}' is no check of a plan but {beside}")
    check = catalogue.check(name)
    spec = check.spec
    essential = tuple(p.name for p in profiles.by_name.values() if name in p.essential)
    return Explanation(
        check=name,
        what=spec.what.strip(),
        why=spec.why.strip(),
        fix=spec.fix.strip(),
        level=spec.level,
        tags=spec.tags,
        timeout=spec.timeout,
        loads=spec.loads,
        needs=spec.needs,
        origin="built in" if check.built_in else check.origin,
        how=_how(check),
        essential_for=("all",) if spec.essential else essential,
        skipped_on=tuple(p.name for p in profiles.by_name.values() if name in p.skip),
        metrics=tuple(_metric(check, metric, profiles) for metric in spec.metrics),
    )


def _metric(check: Check, metric: str, profiles: Profiles) -> MetricExplanation:
    spec = check.spec.metrics[metric]
    limits = []
    if default := check.demands.get(metric):
        limits.append(_limit(None, default))
    for profile in profiles.by_name.values():
        if demand := profile.demands.get(f"{check.name}.{metric}"):
            limits.append(_limit(profile.name, demand))
    return MetricExplanation(
        metric=metric,
        what=spec.what,
        unit=spec.unit,
        action=spec.action or check.spec.fix.strip(),
        counter=spec.counter,
        limits=tuple(limits),
        peers=spec.peers,
        baseline=spec.baseline,
    )


def _limit(sku: str | None, demand: Demand) -> LimitFor:
    return LimitFor(
        sku,
        demand.fail.text if demand.fail else "",
        demand.warn.text if demand.warn else "",
        demand.source,
        demand.reference,
    )


def _how(check: Check) -> str:
    spec = check.spec
    if spec.command is not None:
        return f"sh -c {spec.command[0]!r}" if spec.shell else " ".join(spec.command)
    if spec.file is not None:
        return spec.file
    function = spec.collect or ""
    return f"probes.checks.{function if '.' in function else f'{check.family}.{function}'}"
