"""Counters watched while load runs: what grows then, on an otherwise idle node, is the load's own
doing. Pure.

Every metric that the catalogue calls a counter becomes a metric of the check ``load.counters``. The
agent reads them before, between and after the loading checks and reports the growth.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from probes.agent.bundle import Watched, WatchRequest, check_request
from probes.catalogue import Catalogue, Check, CheckSpec, LimitSpec, MetricSpec
from probes.limits import Demand, parse

WATCH_CHECK = "load.counters"

NO_GROWTH = "== 0"


def with_counters(catalogue: Catalogue) -> Catalogue:
    """The catalogue and, made from its counters, the check that watches them under load."""
    counted = {
        growth_name(check.name, metric): (check, metric)
        for check in catalogue
        if not check.spec.loads
        for metric, spec in check.spec.metrics.items()
        if spec.counter
    }
    if not counted or WATCH_CHECK in catalogue.checks:
        return catalogue
    metrics = {name: _growth_spec(check, metric) for name, (check, metric) in counted.items()}
    spec = CheckSpec(
        what="How much each error and event counter of the node grew while the loading checks ran.",
        why=(
            "Links, memories and power supplies that are sound at rest fail under load; counters since boot"
            " do not say when they grew."
        ),
        fix=(
            "The evidence names the check under which it grew. Run that check alone, and follow the advice of"
            " the counter's own check."
        ),
        level="standard",
        tags=("load",),
        loads=True,
        collect="watch",
        metrics=metrics,
    )
    demands = {
        name: Demand(
            parse(NO_GROWTH) if m.limit and m.limit.fail else None,
            parse(NO_GROWTH) if m.limit and m.limit.warn else None,
            "default",
            m.limit.reference if m.limit else "",
        )
        for name, m in metrics.items()
    }
    return Catalogue({**catalogue.checks, WATCH_CHECK: Check(WATCH_CHECK, spec, demands, "built in")})


def growth_name(check: str, metric: str) -> str:
    return f"{check}.{metric}".replace(".", "_")


def watch_request(
    catalogue: Catalogue, leave_out: Collection[str], params: Mapping[str, Mapping[str, object]]
) -> WatchRequest | None:
    """What the agent is asked to watch: all counters but those of the checks in `leave_out`."""
    watched = [
        Watched(check_request(check.name, check.spec, params.get(check.name)), counters)
        for check in catalogue
        if check.name not in leave_out and not check.spec.loads and (counters := _counters_of(check))
    ]
    return WatchRequest(tuple(watched), check=WATCH_CHECK) if watched else None


def _counters_of(check: Check) -> dict[str, str]:
    return {m: growth_name(check.name, m) for m, spec in check.spec.metrics.items() if spec.counter}


def _growth_spec(check: Check, metric: str) -> MetricSpec:
    spec = check.spec.metrics[metric]
    # A counter that must be zero to pass is a failure when it grows; any other one is worth a look.
    demand = check.demands.get(metric)
    strict = demand is not None and demand.fail is not None and demand.fail.text in ("== 0", "<= 0", "< 1")
    reference = f"growth of {check.name}.{metric} on a node that nobody else uses"
    limit = LimitSpec(reference=reference, **{"fail" if strict else "warn": NO_GROWTH})
    return MetricSpec(what=f"Growth under load: {spec.what}", unit=spec.unit, limit=limit, action=spec.action)
