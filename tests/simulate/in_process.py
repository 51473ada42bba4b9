"""Simulated nodes without a network: what their agents answer, through the code that validates real ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

from inventory.fleet import Node
from inventory.transport import Command, Ending, OnOutput, Outcome, Phase
from probes.catalogue import Level, load_catalogue
from probes.model import NodeVerdict
from probes.model import Outcome as Judged
from probes.plan import make_plan
from probes.profiles import RuleBook, load_profiles
from probes.simulate.fleet import simulated_nodes
from probes.simulate.node import SimulatedNode
from probes.simulate.scenario import PlantedFault, ScenarioFile, build
from probes.validate import ValidationResult, validate


class InProcess:
    """Answers as the agents of `nodes` would. Faults of transport and server need a network: not here."""

    def __init__(self, nodes: Mapping[str, SimulatedNode]) -> None:
        self._nodes = nodes

    async def __aenter__(self) -> InProcess:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome:
        now = time.time()
        for frame in self._nodes[node.name].frames(command.argv[-2], command.stdin, now):
            assert on_output is not None
            on_output(node.name, frame)
        return Outcome(node.name, Ending.EXIT, Phase.COMMAND, status=0, started_at=now, ended_at=now)


@cache
def rule_book() -> RuleBook:
    catalogue = load_catalogue()
    return RuleBook(catalogue, load_profiles(catalogue))


def fleet(sku: str, count: int = 6, seed: int = 1, **faults: str) -> dict[str, SimulatedNode]:
    """`count` nodes ``n1, n2, ...``, with the faults of some: ``n3="link_down"``."""
    planted = tuple(PlantedFault(nodes=node, kind=kind) for node, kind in faults.items())
    file = ScenarioFile(schema="ltpctl/sim/1", nodes=f"n[1-{count}]", sku=sku, seed=seed, faults=planted)
    return simulated_nodes(build(file))


async def judge(nodes: Mapping[str, SimulatedNode], level: Level = "comprehensive") -> ValidationResult:
    """Validate `nodes` by the catalogue and the profiles that ship."""
    rules = rule_book()
    known = [Node(name, sku=node.kind.healthy.sku) for name, node in nodes.items()]
    return await validate(known, make_plan(rules.catalogue, level), InProcess(nodes), rules)


def complaints(verdict: NodeVerdict) -> set[str]:
    """Checks that speak against a node."""
    quiet = (Judged.NOT_APPLICABLE, Judged.UNSUPPORTED)
    return {finding.check for finding in verdict.findings if finding.outcome not in quiet}
