"""What a healthy node of a SKU answers: for every metric of the catalogue a value that meets its limits.

Values are drawn from the limits themselves, so that a new check is simulated as soon as it is in the
catalogue; ``values.yaml`` says more where a plausible value cannot be guessed from a limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inventory.document import load
from inventory.errors import UsageError
from inventory.fleet import Node
from probes.catalogue import Catalogue, MetricSpec
from probes.counters import WATCH_CHECK, growth_name
from probes.limits import Demand, Limit, Operator
from probes.model import Value
from probes.profiles import Profile, RuleBook

_VALUES = Path(__file__).with_name("values.yaml")

MEASURED_SPREAD = 0.004
"""Relative standard deviation of measured numbers on equal nodes."""


LARGEST_DEVIATION = 3.0
"""Standard deviations: sound nodes differ a little, never much, however many they are."""


class Answer(NamedTuple):
    """One measure of a healthy node."""

    metric: str
    device: str | None
    value: Value
    spread: float = 0.0
    """Relative standard deviation between nodes and devices."""


@dataclass(frozen=True)
class Healthy:
    """A healthy node of one SKU."""

    sku: str
    vendors: tuple[str, ...]
    """Keys of `CheckSpec.needs` that it meets, sorted as the agent sends them."""
    devices: Mapping[str, tuple[str, ...]]
    """Class -> names of its parts."""
    answers: Mapping[str, tuple[Answer, ...]]
    """By check; one that such a machine cannot answer is absent. The growth of every counter under load is
    there as the check ``load.counters``."""


def healthy_node(catalogue: Catalogue, rules: RuleBook, profile: Profile) -> Healthy:
    """What a healthy node of `profile` answers to every check of the catalogue.

    Raises UsageError for a limit that no value can be drawn from and that values.yaml does not answer.
    """
    values = _values()
    judged = rules.kind(Node("healthy", sku=profile.name)).rules
    vendors = tuple(sorted({"accelerator", profile.vendor} - {""})) if profile.accelerators else ()
    traits = {*vendors} if vendors else {"cpu"}
    devices = _devices(profile) | values.devices
    fill: dict[str, Value | tuple[str, ...]] = {
        "accelerators": profile.accelerators,
        "pci": min(profile.pci, default=None),
        "bus": devices["bus"],
    }
    answers: dict[str, tuple[Answer, ...]] = {}
    for check in catalogue:
        if check.name == WATCH_CHECK or (check.spec.needs and check.spec.needs not in vendors):
            continue
        found: list[Answer] = []
        for metric, spec in check.spec.metrics.items():
            known = values.known(f"{check.name}.{metric}")
            rule = judged.rule(check.name, metric)
            demand = rule.demand if rule else None
            demanded = demand is not None and demand.explicit
            if known.only is not None and traits.isdisjoint(known.only) and not demanded:
                continue
            try:
                value = _value(known.value, demand, spec.unit, fill)
            except ValueError as error:
                name = f"{check.origin}: {check.name}.{metric}"
                raise UsageError(f"{name}: {error}; {_VALUES.name} must name one") from None
            if value is None:
                continue
            spread = known.spread if known.spread is not None else MEASURED_SPREAD * _is_measured(spec)
            parts: tuple[str | None, ...] = devices.get(known.class_of(profile.vendor), ()) or (None,)
            each = value if isinstance(value, tuple) else (value,) * len(parts)
            found += [
                Answer(metric, part, one, spread if _may_vary(one, spread, demand) else 0.0)
                for part, one in zip(parts, each, strict=True)
            ]
        if found:
            answers[check.name] = tuple(found)
    answers[WATCH_CHECK] = tuple(_growth(catalogue, answers))
    return Healthy(profile.name, vendors, devices, answers)


class _Known(BaseModel):
    """What values.yaml says of one name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    devices: str | None = None
    of: dict[str, str] = Field(default_factory=dict)
    value: float | int | str | bool | None = None
    spread: float | None = Field(default=None, ge=0, le=0.05)
    only: tuple[str, ...] | None = None

    def class_of(self, maker: str) -> str:
        return self.of.get(maker) or self.devices or "node"


class _Values(BaseModel):
    """values.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal["ltpctl/sim-values/1"] = Field(alias="schema")
    devices: dict[str, tuple[str, ...]]
    answers: dict[str, _Known]

    def known(self, full: str) -> _Known:
        """Of one metric: its own entry over its check's over its family's, field by field."""
        check = full.rpartition(".")[0]
        given: dict[str, object] = {}
        for name in (full.partition(".")[0], check, full):
            if name in self.answers:
                given |= self.answers[name].model_dump(exclude_unset=True)
        return _Known.model_validate(given)


@cache
def _values() -> _Values:
    return load(_VALUES, _Values)


def said_names() -> Mapping[str, frozenset[str]]:
    """Families, checks and metrics that values.yaml speaks of -> classes of devices that it gives them."""
    return {
        name: frozenset({known.class_of(""), *known.of.values()}) for name, known in _values().answers.items()
    }


def _devices(profile: Profile) -> dict[str, tuple[str, ...]]:
    """The classes that follow from the SKU."""
    indices = range(profile.accelerators)
    return {
        "node": (),
        "accelerator": tuple(str(i) for i in indices),
        "bus": tuple(f"0000:{0x10 + 8 * i:02x}:00.0" for i in indices),
        "pair": tuple(f"{i}-{j}" for i in indices for j in indices if i != j),
        "maker": (profile.vendor,) if profile.accelerators and profile.vendor else (),
    }


def _is_measured(spec: MetricSpec) -> bool:
    return spec.baseline is not None or (spec.peers is not None and spec.peers.rule == "robust_z")


def _value(
    known: Value, demand: Demand | None, unit: str, fill: Mapping[str, Value | tuple[str, ...]]
) -> Value | tuple[str, ...]:
    """What values.yaml says if the limits of this SKU agree with it, else a value drawn from them.

    A tuple holds one value for each device. Raises ValueError if no value can be drawn.
    """
    if isinstance(known, str) and known.startswith("{"):
        return fill[known.strip("{}")]
    if known is not None and _meets(demand, known):
        return known
    return value_within(demand, unit)


def _may_vary(value: Value, spread: float, demand: Demand | None) -> bool:
    """Whether every value that nodes draw around this one is healthy too."""
    if isinstance(value, str | bool) or not value or not spread:
        return False
    reach = LARGEST_DEVIATION * spread
    return _meets(demand, value * (1 - reach)) and _meets(demand, value * (1 + reach))


def _growth(catalogue: Catalogue, answers: Mapping[str, tuple[Answer, ...]]) -> Iterator[Answer]:
    for check in catalogue:
        for answer in answers.get(check.name, ()) if not check.spec.loads else ():
            if check.spec.metrics[answer.metric].counter:
                yield Answer(growth_name(check.name, answer.metric), answer.device, 0)


def value_within(demand: Demand | None, unit: str) -> Value:
    """A value that both limits of `demand` call healthy; 0 or a word where there is no limit.

    Raises ValueError for limits that no value can be drawn from (``matches``).
    """
    limits = _limits(demand)
    if not limits:
        return 0 if unit else "sim-1"
    for candidate in (value for limit in limits for value in _candidates(limit)):
        if _meets(demand, candidate):
            return candidate
    raise ValueError(f"no value can be drawn from {' and '.join(map(str, limits))}")


def _limits(demand: Demand | None) -> list[Limit]:
    return [limit for limit in (demand.warn, demand.fail) if limit] if demand else []


def _meets(demand: Demand | None, value: Value) -> bool:
    return all(limit.holds(value) for limit in _limits(demand))


def _candidates(limit: Limit) -> Iterator[Value]:
    first = limit.operands[0] if limit.operands else None
    match limit.operator, first:
        case Operator.EQUAL | Operator.IN, _:
            yield first
        case Operator.UNEQUAL, int() | float():
            yield first + 1
        case Operator.UNEQUAL, _:
            yield "ok"
        case Operator.LESS | Operator.AT_MOST, int() | float():
            yield 0
            yield first / 2 if first > 0 else first - 1
        case Operator.MORE | Operator.AT_LEAST, int() | float():
            yield first * 1.05 if isinstance(first, float) else first + max(1, round(abs(first) * 0.05))
        case Operator.BETWEEN, int() | float():
            second = limit.operands[1]
            assert isinstance(second, int | float)
            yield (first + second) / 2
            yield first
        case Operator.WITHIN, _:
            yield limit.operands[1]
        case Operator.KNOWN, _:
            yield "sim-1"
        case _:
            return
