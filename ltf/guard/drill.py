"""Faults made on purpose, to see the guards find them. Nothing happens unless LTF_DRILL is set.

LTF_DRILL holds one JSON object, or a list of them:

    {"fault": "bitflip_gradient", "rank": 1, "step": 20, "layer": 2, "bit": 30}

| key       | meaning                                                                                        |
|-----------|------------------------------------------------------------------------------------------------|
| fault     | bitflip_gradient, bitflip_matmul, nan_gradient, nan_activation or slow                         |
| rank      | the rank that suffers it                                                                       |
| step      | the first step in which it does                                                                |
| layer     | which layer; -1: the embedding, the number of layers: the head. Default 0                      |
| segment   | embed, attention, router, experts, ffn or head: whose output is hit (with nan_gradient: the    |
|           | gradient of its output). Default attention; of gradients: the parameters' before the reduction |
| element   | index in the flattened tensor. Default 0                                                       |
| bit       | which bit of the element, 0 the least significant. Default 12                                  |
| persistent| false: once. true: every time from that step on, in replays too. Default false                 |
| seconds   | of `slow`: added to each of the rank's micro-batches from `step` on. Default 0.1               |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from ltf.findings import Finding, Severity
from ltf.guard.point import Phase, Point, Segment
from ltf.guard.segments import recomputing

VARIABLE = "LTF_DRILL"


class DrillError(ValueError):
    """LTF_DRILL cannot be understood. One line: what was found, what is expected."""


class Fault(StrEnum):
    BITFLIP_GRADIENT = "bitflip_gradient"
    BITFLIP_MATMUL = "bitflip_matmul"
    NAN_GRADIENT = "nan_gradient"
    NAN_ACTIVATION = "nan_activation"
    SLOW = "slow"


@dataclass(frozen=True)
class Order:
    """One fault to make; the fields are those of LTF_DRILL."""

    fault: Fault
    rank: int
    step: int
    layer: int = 0
    segment: Segment | None = None
    element: int = 0
    bit: int = 12
    persistent: bool = False
    seconds: float = 0.1

    def hits(self, point: Point) -> bool:
        """Whether that is the tensor to spoil; of several micro-batches the first."""
        if self.fault in (Fault.BITFLIP_GRADIENT, Fault.NAN_GRADIENT) and self.segment is None:
            wanted = {-1: Segment.EMBED}.get(self.layer, Segment.BLOCK)
            phase, segments = (
                Phase.BUCKET,
                {wanted, Segment.MODEL} if self.layer < 0 else {wanted, Segment.HEAD},
            )
        else:
            gradient = self.fault in (Fault.BITFLIP_GRADIENT, Fault.NAN_GRADIENT)
            phase = Phase.BACKWARD if gradient else Phase.FORWARD
            segments = {Segment.ATTENTION if self.segment is None else self.segment}
        return (point.phase, point.layer, point.micro_batch) == (
            phase,
            self.layer,
            0,
        ) and point.segment in segments


def orders_from(environment: Mapping[str, str]) -> tuple[Order, ...]:
    """What LTF_DRILL asks for; nothing where it is not set. DrillError if it is wrong."""
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return ()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DrillError(
            f"{VARIABLE}: not JSON ({error}); give an object such as "
            '{"fault": "bitflip_gradient", "rank": 0, "step": 5}'
        ) from None
    return tuple(_order(item) for item in (document if isinstance(document, list) else [document]))


class Drill:
    """This rank's share of the orders; `tamper` is for the hooks that watch the passes."""

    def __init__(self, orders: Sequence[Order], rank: int) -> None:
        self._orders = [order for order in orders if order.rank == rank]
        self._done: set[Order] = set()
        self._step = -1

    def begin(self, step: int) -> None:
        """A step, or the replay of one, begins."""
        self._step = step

    def slow_down(self, module: nn.Module) -> None:
        """`slow` makes this module's training passes last longer: one that is passed once a micro-batch.

        Call it after a stopwatch of own work has put its hooks on the module, so that it sees the slowness.
        """

        # Under torch.compile this is no part of the graph. Recomputation is no second pass.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def wait(module: nn.Module, args: object) -> None:
            slow = [order for order in self._due() if order.fault is Fault.SLOW]
            if slow and torch.is_grad_enabled() and not recomputing():
                time.sleep(sum(order.seconds for order in slow))

        if any(order.fault is Fault.SLOW for order in self._orders):
            module.register_forward_pre_hook(wait)

    def tamper(self, point: Point, tensor: Tensor) -> Tensor:
        """The tensor, or a spoiled copy of it if an order says so."""
        for order in self._due():
            if order.fault is not Fault.SLOW and order.hits(point) and tensor.numel():
                if not order.persistent:
                    self._done.add(order)
                return _spoiled(tensor, order)
        return tensor

    def _due(self) -> list[Order]:
        lasting = [o for o in self._orders if o.persistent or o.fault is Fault.SLOW]
        once = [o for o in self._orders if o not in lasting and o not in self._done]
        return [o for o in lasting if self._step >= o.step] + [o for o in once if self._step == o.step]


def armed(orders: Sequence[Order], step: int) -> list[Finding]:
    """What everyone must know at the start: faults of this run are made on purpose."""
    return [
        Finding(
            "drill.armed",
            Severity.WARNING,
            step,
            f"DRILL: {VARIABLE} asks for {order.fault} on rank {order.rank} at step {order.step}"
            f"{' and ever after' if order.persistent else ''}: faults of this run are made on purpose",
            evidence={
                "fault": order.fault.value,
                "rank": order.rank,
                "step": order.step,
                "layer": order.layer,
                "segment": None if order.segment is None else order.segment.name.lower(),
                "persistent": order.persistent,
            },
        )
        for order in orders
    ]


@torch.no_grad()
def flip_bit(tensor: Tensor, element: int, bit: int) -> Tensor:
    """A copy with one bit of one element changed."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    data = copy.view(-1).view(torch.uint8)
    size = tensor.element_size()
    # Bytes from the least significant on; every machine that torch runs on stores them in this order.
    byte = (element % tensor.numel()) * size + bit // 8 % size
    data[byte] = data[byte] ^ (1 << bit % 8)
    return copy


def _spoiled(tensor: Tensor, order: Order) -> Tensor:
    if order.fault in (Fault.BITFLIP_GRADIENT, Fault.BITFLIP_MATMUL):
        return flip_bit(tensor, order.element, order.bit)
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    copy.view(-1)[order.element % copy.numel()] = float("nan")
    return copy


def _order(item: Any) -> Order:
    if not isinstance(item, dict):
        raise DrillError(f"{VARIABLE}: found {item!r}, expected a JSON object")
    known = [field.name for field in fields(Order)]
    for key in item:
        if key not in known:
            raise DrillError(f"{VARIABLE}: unknown key {key!r}; known are {', '.join(known)}")
    for key in ("fault", "rank", "step"):
        if key not in item:
            raise DrillError(f"{VARIABLE}: {key} is missing")
    values = dict(item)
    if values["fault"] not in [fault.value for fault in Fault]:
        raise DrillError(
            f"{VARIABLE}: fault {values['fault']!r} is none of {', '.join(fault.value for fault in Fault)}"
        )
    values["fault"] = Fault(values["fault"])
    for key in ("rank", "step", "layer", "element", "bit"):
        if key in values and type(values[key]) is not int:
            raise DrillError(f"{VARIABLE}: {key} is {values[key]!r}, expected a whole number")
    if type(values.get("persistent", False)) is not bool:
        raise DrillError(f"{VARIABLE}: persistent is {values['persistent']!r}, expected true or false")
    if not isinstance(values.get("seconds", 0.1), int | float):
        raise DrillError(f"{VARIABLE}: seconds is {values['seconds']!r}, expected a number")
    if (name := values.get("segment")) is not None:
        hit = {s.name.lower(): s for s in Segment if s not in (Segment.MODEL, Segment.BLOCK)}
        if name not in hit:
            raise DrillError(f"{VARIABLE}: segment {name!r} is none of {', '.join(hit)}")
        values["segment"] = hit[name]
    return Order(**values)
