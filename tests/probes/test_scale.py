"""Thousands of nodes: what one of them costs the controller in time and in memory."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc

import pytest

from inventory.fleet import Node
from inventory.transport import Command, Ending, OnOutput, Phase
from inventory.transport import Outcome as Ended
from probes.catalogue import Catalogue, load_catalogue
from probes.model import Verdict
from probes.plan import Plan, make_plan
from probes.profiles import Profiles, RuleBook
from probes.validate import ValidationResult, validate

DEVICES = 1
"""Of each metric: with the quick plan, more than 300 measures a node."""


class Recorded:
    """Every node gives the same recorded frames, as the wire format has them, without a network in
    between."""

    def __init__(self, plan: Plan) -> None:
        self.frames = [
            {"hello": {"agent": 1, "python": "3.11.2", "hostname": "n", "vendors": ["accelerator"]}}
        ]
        for check in plan.checks:
            measures = [
                [metric, str(device), self.value(plan, check.name, metric)]
                for metric in check.spec.metrics
                for device in range(DEVICES)
            ]
            lines = [f"{check.name} says something at length, line {i}, " + "x" * 80 for i in range(20)]
            frame = {"check": check.name, "status": "answered", "seconds": 0.1, "measures": measures}
            self.frames.append(frame | {"evidence": lines, "detail": ""})
        self.frames.append({"done": True, "seconds": 1.0})
        self.bodies = [json.dumps(frame).encode() for frame in self.frames]
        self.measures = sum(len(frame.get("measures", ())) for frame in self.frames)  # type: ignore[arg-type]

    @staticmethod
    def value(plan: Plan, check: str, metric: str) -> object:
        demand = next(c for c in plan.checks if c.name == check).demands.get(metric)
        limits = [limit for limit in (demand.fail, demand.warn) if limit] if demand else []
        tried = [o for limit in limits for o in limit.operands] + [0, 1, 1e9, -1e9, "ok"]
        return next((v for v in tried if all(limit.holds(v) for limit in limits)), 0)

    async def __aenter__(self) -> Recorded:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Ended:
        assert on_output is not None
        head = b"\x1eltp1 " + command.argv[-2].encode() + b" "
        await asyncio.sleep(0)
        for body in self.bodies:
            on_output(node.name, head + body + b"\n")
        return Ended(node.name, Ending.EXIT, Phase.COMMAND, status=0)


@pytest.fixture(scope="module")
def everything() -> Catalogue:
    return load_catalogue()


def judged(catalogue: Catalogue, count: int) -> tuple[ValidationResult, Recorded]:
    plan = make_plan(catalogue, "quick")
    transport = Recorded(plan)
    nodes = [Node(f"n{i:04}") for i in range(count)]
    book = RuleBook(catalogue, Profiles({}))
    return asyncio.run(validate(nodes, plan, transport, book)), transport


def test_a_node_of_the_quick_plan_costs_a_few_milliseconds_and_all_of_them_are_judged(
    everything: Catalogue,
) -> None:
    judged(everything, 8)
    start = time.process_time()
    result, transport = judged(everything, 128)
    seconds = (time.process_time() - start) / 128
    assert transport.measures > 300
    assert len(result.verdicts) == 128
    assert len({(v.verdict, len(v.findings)) for v in result.verdicts}) == 1
    # The budget of 12 ms a node has SSH in it as well; measured alone this is a fraction of the bound.
    assert seconds < 0.024


def test_memory_grows_by_little_for_a_node(everything: Catalogue) -> None:
    judged(everything, 8)
    tracemalloc.start()
    try:
        result, _ = judged(everything, 64)
        few = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        del result
        result, _ = judged(everything, 192)
        many = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.summary[Verdict.UNKNOWN] in (0, 192)
    # 2,048 nodes in less than 300 MB.
    assert (many - few) / 128 * 2048 < 300e6
