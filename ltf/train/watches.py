"""What is watched from step to step: values that all ranks know, so that all find the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ltf.balance import Balancer, Plan, by_unit
from ltf.config.schema import Config
from ltf.findings import Finding, Json
from ltf.guard.collapse import CollapseWatch
from ltf.guard.spikes import SpikeWatch
from ltf.parallel.layout import Layout
from ltf.slow_ranks import SlowRanks
from ltf.timing import OwnSeconds
from ltf.train.reading import micro_batches_of_a_step


class Watches:
    """`state` and `restore`: for checkpoints, the same on all ranks."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self._micro = config.batch.micro
        self._units = [layout.unit(rank) for rank in range(layout.world)]
        stages = [layout.place(rank).pipeline for rank in range(layout.world)]
        comparable = config.model.moe_layers if config.model.moe is not None else None
        self.spikes = SpikeWatch(config.guard.spikes)
        self.collapse = CollapseWatch(config.guard.collapse, comparable)
        self.slow = SlowRanks(config.noise, stages)
        self.balancer = Balancer(
            config.balance, layout.units, micro_batches_of_a_step(config, layout), layout.pipeline
        )

    def speed(self, step: int, own: Sequence[OwnSeconds]) -> list[Finding]:
        """Each rank's own work of a step that was computed as planned.

        A plan follows all of it, uneven work too: that is time as well. Slow is who takes long for even work.
        """
        self.balancer.observe(step, by_unit([each.per_row * self._micro for each in own], self._units))
        return self.slow.observe(step, own)

    def replan(self, step: int) -> Plan | None:
        """The plan that holds from `step` on, if it is a new one."""
        return self.balancer.replan(step)

    def state(self) -> dict[str, Json]:
        return {
            "spikes": self.spikes.state(),
            "collapse": self.collapse.state(),
            "slow": self.slow.state(),
            "balance": self.balancer.state(),
        }

    def restore(self, state: Mapping[str, Json]) -> None:
        """Watches that a checkpoint does not know begin anew."""
        for name, watch in (
            ("spikes", self.spikes),
            ("collapse", self.collapse),
            ("slow", self.slow),
            ("balance", self.balancer),
        ):
            found = state.get(name)
            if isinstance(found, dict):
                watch.restore(found)
