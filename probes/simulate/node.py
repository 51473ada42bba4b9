"""One simulated node: which frames it answers a request with. Pure; chance comes from the scenario's seed."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from probes.counters import WATCH_CHECK
from probes.model import Value
from probes.simulate.healthy import LARGEST_DEVIATION, Answer, Healthy
from probes.simulate.scenario import Behaviour

RECORD_SEPARATOR = b"\x1e"

Measures = list[tuple[str, str | None, Value]]


class BadPayload(ValueError):
    """What was sent is no request that the agent could read."""


@dataclass(frozen=True)
class Effect:
    """What one fault does on nodes of one kind: its data, with the names of devices filled in."""

    measures: Mapping[str, Mapping[tuple[str, str | None], Value]] = field(default_factory=dict)
    """Check -> (metric, device) -> value."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Full metric name -> factor."""
    gone: frozenset[str] = frozenset()
    """Devices whose measures are not reported."""
    hangs: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    behaviour: Behaviour | None = None
    clock_offset: float = 0.0
    delay: float = 0.0

    @cached_property
    def checks(self) -> frozenset[str]:
        """Checks whose answers differ from a healthy node's."""
        scaled = {name.rpartition(".")[0] for name in self.scale}
        return frozenset(self.measures) | scaled | self.hangs | self.absent


@dataclass
class Kind:
    """A healthy node of one SKU, and the encoded answers that all its nodes have in common."""

    healthy: Healthy
    _encoded: dict[str, bytes] = field(default_factory=dict)

    def common(self, check: str) -> bytes | None:
        """The record of a check whose values are the same on every node; None if they are not."""
        if check not in self._encoded:
            answers = self.healthy.answers.get(check, ())
            same = bool(answers) and not any(answer.spread for answer in answers)
            self._encoded[check] = _json(_answered(check, [a[:3] for a in answers])) if same else b""
        return self._encoded[check] or None


@dataclass(frozen=True)
class SimulatedNode:
    """A node by name, its kind, and its faults."""

    name: str
    kind: Kind
    effects: tuple[Effect, ...] = ()
    seed: int = 0
    latency: float = 0.0

    @property
    def behaviour(self) -> Behaviour | None:
        """What the node does wrong below the agent, if anything."""
        return next((effect.behaviour for effect in self.effects if effect.behaviour), None)

    @property
    def seconds(self) -> float:
        """How long the node takes to answer."""
        return self.latency + sum(effect.delay for effect in self.effects)

    def frames(self, nonce: str, payload: bytes, now: float) -> list[bytes]:
        """The frames that the agent on such a node would write for `payload` at Unix time `now`.

        See probes.agent for their form. Raises BadPayload.
        """
        request = _request(payload)
        mark = RECORD_SEPARATOR + f"ltp1 {nonce} ".encode()
        bodies = [_json(self._hello(now)), *(self._record(check) for check in request["checks"])]
        if watch := request.get("watch"):
            bodies.append(_json(self._watched(watch, request["checks"])))
        bodies.append(_json({"done": True, "seconds": 0.1 + self.seconds, "clean": True}))
        return [mark + body + b"\n" for body in bodies]

    def _hello(self, now: float) -> dict[str, Any]:
        boot = hashlib.sha256(f"{self.seed}/{self.name}".encode()).hexdigest()
        return {
            "hello": {
                "agent": 1,
                "python": "3.10.12",
                "hostname": self.name,
                "boot_id": f"{boot[:8]}-{boot[8:12]}-4{boot[13:16]}-8{boot[17:20]}-{boot[20:32]}",
                "uid": 0,
                "time": now + sum(effect.clock_offset for effect in self.effects),
                "kernel": "6.8.0-sim",
                "machine": "x86_64",
                "cpus": 192,
                "vendors": list(self.kind.healthy.vendors),
            }
        }

    def _record(self, asked: Mapping[str, Any]) -> bytes:
        name: str = asked["check"]
        needs = asked.get("needs")
        if needs and needs not in self.kind.healthy.vendors:
            return _json(_ended(name, "not_applicable", f"this node has no {needs} device"))
        for effect in self.effects:
            if name in effect.hangs:
                limit = float(asked["timeout"])
                return _json(_ended(name, "timeout", f"did not end within {limit:g} s", limit))
            if name in effect.absent:
                return _json(_ended(name, "unsupported", "its tool is not installed on this node"))
        if name not in self.kind.healthy.answers:
            return _json(_ended(name, "unsupported", "a simulated node has no answer to this"))
        if not any(name in effect.checks or effect.gone for effect in self.effects):
            common = self.kind.common(name)
            if common is not None:
                return common
        return _json(_answered(name, self._measures(name)))

    def _watched(self, watch: Mapping[str, Any], checks: list[Mapping[str, Any]]) -> dict[str, Any]:
        name = watch.get("check", WATCH_CHECK)
        vendors = self.kind.healthy.vendors
        if not any(c.get("loads") and (not c.get("needs") or c["needs"] in vendors) for c in checks):
            return _ended(name, "not_applicable", "nothing loaded this node")
        asked = {new for collect in watch["collect"] for new in collect.get("counters", {}).values()}
        grown = [measure for measure in self._measures(WATCH_CHECK) if measure[0] in asked]
        if not grown:
            return _ended(name, "not_applicable", "none of the counters is kept on this node")
        return _answered(name, grown)

    def _measures(self, check: str) -> Measures:
        measures: dict[tuple[str, str | None], Value] = {}
        draw = random.Random(f"{self.seed}/{self.name}/{check}")  # noqa: S311
        for answer in self.kind.healthy.answers.get(check, ()):
            measures[answer.metric, answer.device] = self._shaded(f"{check}.{answer.metric}", answer, draw)
        for effect in self.effects:
            for place in [place for place in measures if place[1] in effect.gone]:
                del measures[place]
            measures |= effect.measures.get(check, {})
        return [(metric, device, value) for (metric, device), value in measures.items()]

    def _shaded(self, full: str, answer: Answer, draw: random.Random) -> Value:
        """A measured number differs a little between nodes and devices, and by the factor of a fault."""
        value = answer.value
        if isinstance(value, str | bool) or value is None:
            return value
        factor = 1.0
        if answer.spread:
            deviation = draw.gauss(0.0, 1.0)
            factor += answer.spread * max(-LARGEST_DEVIATION, min(LARGEST_DEVIATION, deviation))
        for effect in self.effects:
            factor *= effect.scale.get(full, 1.0)
        if factor == 1.0:
            return value
        return round(value * factor) if isinstance(value, int) else value * factor


def _answered(check: str, measures: Any) -> dict[str, Any]:
    return _ended(check, "answered") | {"measures": measures}


def _ended(check: str, status: str, detail: str = "", seconds: float = 0.01) -> dict[str, Any]:
    return {
        "check": check,
        "status": status,
        "seconds": seconds,
        "measures": [],
        "evidence": [],
        "detail": detail,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


_MOST_BYTES = 64 << 20
"""Of a request, unpacked."""


@lru_cache(maxsize=8)
def _request(payload: bytes) -> Mapping[str, Any]:
    """The request of a payload. The same one comes to every node of a run; it is read once."""
    try:
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(payload, _MOST_BYTES)
        if not unpacking.eof:
            raise BadPayload("it is cut short, or too large")
        request: Mapping[str, Any] = json.loads(text)["request"]
        _check_names(request)
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise BadPayload(f"{type(error).__name__}: {error}") from None
    return request


def _check_names(request: Mapping[str, Any]) -> None:
    for check in _entries(request):
        if not isinstance(check["check"], str) or not isinstance(check["timeout"], int | float):
            raise BadPayload("a check without a name or a limit")


def _entries(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from request["checks"]
    yield from (request.get("watch") or {"collect": ()})["collect"]
