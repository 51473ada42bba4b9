"""What a decision is made from, read once: who is guilty, who is free, how far the job got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from probes.model import Verdict
from recovery.supervise import past
from recovery.supervise.model import (
    Attempt,
    Budget,
    CheckpointView,
    Evidence,
    Fault,
    FleetView,
    Probed,
    Proof,
)
from recovery.supervise.settings import Settings


@dataclass(frozen=True)
class Situation:
    """Everything that a rule may ask. `attempts`: the last one carries `faults`, what is known of it now."""

    attempts: Sequence[Attempt]
    faults: tuple[Fault, ...]
    budget: Budget
    fleet: FleetView
    checkpoints: tuple[CheckpointView, ...]
    settings: Settings
    now: float
    probed: dict[str, Probed] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probed", {each.node: each for each in self.fleet.probed})

    @cached_property
    def grave(self) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.faults if fault.ends)

    @property
    def root(self) -> Fault | None:
        return self.grave[0] if self.grave else None

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.fleet.nodes))

    @cached_property
    def away(self) -> dict[str, str]:
        """Nodes that may not be used: why."""
        return {each.node: each.reason for each in self.fleet.out}

    @cached_property
    def guilty(self) -> dict[str, str]:
        """Nodes of the job against which there is proof that they would fail again: what it is."""
        found: dict[str, str] = {}
        for fault in self.grave:
            if fault.proof is not Proof.WAIT_FOR:
                found |= dict.fromkeys(fault.convicted, f"{fault.kind}, by {fault.proof}")
        for node, result in self.probed.items():
            if result.verdict is Verdict.UNHEALTHY:
                found[node] = "its probe found it unhealthy"
        return {node: found[node] for node in self.nodes if node in found}

    @cached_property
    def bad(self) -> dict[str, str]:
        """Nodes of the job that must be replaced: why."""
        found = {node: f"it is out: {why}" for node, why in self.away.items()} | self.guilty
        return {node: found[node] for node in self.nodes if node in found}

    @cached_property
    def doubtful(self) -> dict[str, str]:
        """Nodes of the job that are replaced if a spare is at hand: their part is proven, not that
        they would fail again: what a hang waits on may be the program's doing, and slow is not broken."""
        found = {
            node: f"{fault.kind}, by {fault.proof}"
            for fault in self.faults
            if not fault.ends or fault.proof is Proof.WAIT_FOR
            for node in fault.convicted
        }
        return {node: found[node] for node in self.nodes if node in found and node not in self.bad}

    @cached_property
    def spares(self) -> tuple[str, ...]:
        """Validated ones, here or by a probe just now."""
        passed = [
            n for n in self.fleet.unvalidated if self._verdict(n) in (Verdict.HEALTHY, Verdict.DEGRADED)
        ]
        return tuple(
            node
            for node in dict.fromkeys([*self.fleet.spares, *passed])
            if self._usable(node) and self._verdict(node) is not Verdict.UNHEALTHY
        )

    @property
    def untried(self) -> tuple[str, ...]:
        """Spares that a probe may still show to be good."""
        others = [n for n in self.fleet.unvalidated if n not in self.spares and self._usable(n)]
        return tuple(node for node in dict.fromkeys(others) if not self.answered(node))

    def answered(self, node: str) -> bool:
        """Nothing more is to be had from probing it."""
        result = self.probed.get(node)
        if result is None:
            return False
        return result.verdict is not Verdict.UNKNOWN or result.tries >= self.settings.probe_tries

    @property
    def short(self) -> int:
        """Nodes that a start lacks; negative: validated spares that are left over."""
        return max(0, self.fleet.needed - len(self.nodes)) + len(self.bad) - len(self.spares)

    @cached_property
    def without_step(self) -> int:
        """Attempts in a row, up to the last, that did no new step."""
        return past.trailing(past.new_steps(self.attempts, self.settings.silent_progress_seconds))

    @property
    def lost_left(self) -> float:
        """Seconds that may still be lost."""
        return self.settings.max_lost_seconds - self.budget.lost_seconds

    @cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        seen = [e for fault in self.faults for e in fault.evidence]
        seen += [e for each in self.fleet.probed for e in each.evidence]
        return tuple(dict.fromkeys(seen))

    def what(self) -> str:
        """The failure in a few words."""
        if not self.attempts:
            return "the job has not started yet"
        last = f"attempt {self.attempts[-1].number}"
        if self.root is None:
            return f"{last} ended and nothing shows why"
        return f"{last}: {self.root.kind} ({self.root.message})"

    def _verdict(self, node: str) -> Verdict | None:
        return self.probed[node].verdict if node in self.probed else None

    def _usable(self, node: str) -> bool:
        return node not in self.away and node not in self.nodes
