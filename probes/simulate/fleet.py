"""From a scenario to the simulated nodes."""

from __future__ import annotations

import re

from inventory.document import Document, Place
from inventory.errors import UsageError
from probes.catalogue import Catalogue, load_catalogue
from probes.model import Value
from probes.profiles import Profiles, RuleBook, load_profiles
from probes.simulate.healthy import Healthy, healthy_node
from probes.simulate.node import Effect, Kind, SimulatedNode
from probes.simulate.scenario import FaultKind, Override, Scenario, ScenarioFile, fault_kinds


def simulated_nodes(scenario: Scenario) -> dict[str, SimulatedNode]:
    """The nodes of `scenario` by name, in its order.

    Raises UsageError for an unknown SKU, and for a fault that would change nothing on nodes of its SKU.
    """
    catalogue = load_catalogue(scenario.checks)
    profiles = load_profiles(catalogue, scenario.profiles)
    kinds = {
        sku: _kind(sku, catalogue, profiles, scenario) for sku in dict.fromkeys(scenario.sku_of.values())
    }
    effects: dict[tuple[str, str], Effect] = {}
    nodes = {}
    for name, sku in scenario.sku_of.items():
        mine = []
        for fault in scenario.faults.get(name, ()):
            if (fault, sku) not in effects:
                effects[fault, sku] = effect_of(fault, fault_kinds()[fault], kinds[sku].healthy)
            mine.append(effects[fault, sku])
        nodes[name] = SimulatedNode(name, kinds[sku], tuple(mine), scenario.seed, scenario.latency)
    return nodes


def _kind(sku: str, catalogue: Catalogue, profiles: Profiles, scenario: Scenario) -> Kind:
    try:
        profile = profiles.find(sku)
    except UsageError as error:
        if scenario.document is None:
            raise
        raise scenario.document.error(_place_of(sku, scenario.document), str(error)) from None
    return Kind(healthy_node(catalogue, RuleBook(catalogue, profiles), profile))


def _place_of(sku: str, document: Document) -> Place:
    skus = document.parse(ScenarioFile).skus
    return next((("skus", nodes) for nodes, named in skus.items() if named == sku), ("sku",))


def effect_of(name: str, fault: FaultKind, healthy: Healthy) -> Effect:
    """What `fault` does on nodes like `healthy`. Raises UsageError if that is nothing at all."""
    measures: dict[str, dict[tuple[str, str | None], Value]] = {}
    for override in fault.measures:
        check, _, metric = override.metric.rpartition(".")
        found = _changed(override, check, metric, healthy)
        if found is not None:
            device, value = found
            measures.setdefault(check, {})[metric, device] = value
    scale = {full: factor for full, factor in fault.scale.items() if _reported(full, healthy)}
    effect = Effect(
        measures=measures,
        scale=scale,
        gone=_gone(fault.lost, healthy),
        hangs=frozenset(check for check in fault.hangs if check in healthy.answers),
        absent=frozenset(check for check in fault.absent if check in healthy.answers),
        behaviour=fault.behaviour,
        clock_offset=fault.clock_offset,
        delay=fault.delay,
    )
    if effect == Effect():
        raise UsageError(f"the fault {name} ({fault.what}) changes nothing on nodes of SKU {healthy.sku}")
    return effect


def _changed(
    override: Override, check: str, metric: str, healthy: Healthy
) -> tuple[str | None, Value] | None:
    """Device and value; None where such nodes do not report the metric, or have no such device."""
    answers = [answer for answer in healthy.answers.get(check, ()) if answer.metric == metric]
    if not answers:
        return None
    device = None
    if override.device is not None:
        device = _device(override.device, healthy, {answer.device for answer in answers})
        if device is None:
            return None
    if override.add is None:
        return device, override.value
    usual = next((a.value for a in answers if a.device == device), answers[0].value)
    if isinstance(usual, str | bool) or usual is None:
        raise UsageError(f"{override.metric} is {usual!r} on a healthy node; nothing can be added to it")
    return device, usual + override.add


def _device(place: str, healthy: Healthy, reported: set[str | None]) -> str | None:
    """Name of a part; an accelerator is called as the check calls it, by number or by address."""
    found = re.fullmatch(r"(\w+)\[(\d+)\]", place)
    if found is None or found[1] not in healthy.devices:
        raise UsageError(
            f"'{place}' is no device; write CLASS[INDEX] with one of {', '.join(healthy.devices)}"
        )
    classes = ("accelerator", "bus") if found[1] == "accelerator" else (found[1],)
    index = int(found[2])
    names = [healthy.devices[one][index] for one in classes if index < len(healthy.devices[one])]
    return next((name for name in names if name in reported), names[0] if names else None)


def _reported(full: str, healthy: Healthy) -> bool:
    check, _, metric = full.rpartition(".")
    return any(answer.metric == metric for answer in healthy.answers.get(check, ()))


def _gone(lost: int | None, healthy: Healthy) -> frozenset[str]:
    """The lost accelerator and its pairs. What the PCI bus itself shows of it stays."""
    accelerators = healthy.devices["accelerator"]
    if lost is None or lost >= len(accelerators):
        return frozenset()
    me = accelerators[lost]
    return frozenset({me, *(pair for pair in healthy.devices["pair"] if me in pair.split("-"))})
