"""A small training run under the guards, on one rank or many, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltf.config import schema
from ltf.config.schema import Config, Data, Parallel, Recompute
from ltf.data.loader import Batch
from ltf.findings import Finding
from ltf.guard.drill import Drill, Order
from ltf.guard.finite import Report, attribute
from ltf.guard.replay import Outcome, Replay
from ltf.guard.watch import Watch
from ltf.model.args import ModelArgs, Stage
from ltf.model.decoder import Decoder
from ltf.parallel import stages
from ltf.parallel.pipeline import PipelinePasses
from ltf.parallel.shard import build, local
from ltf.parallel.world import World, join
from ltf.passes import Passes, Totals
from ltf.train.accumulation import Accumulation
from tests.ltf.model.shapes import DENSE, MOE

LENGTH = 8
ALONE = Parallel()
TINY = replace(DENSE, vocab_size=31, width=16, head_dim=8, heads=2, kv_heads=1, ffn_width=24)
TINY_MOE = replace(MOE, vocab_size=31, layers=2, width=16, head_dim=8, heads=2, kv_heads=1)


@dataclass(frozen=True)
class Run:
    """`alter`: done to the parts after they are made, on every rank; a module-level function."""

    args: ModelArgs = TINY
    parallel: Parallel = ALONE
    micro_batches: int = 2
    orders: tuple[Order, ...] = ()
    recompute: bool = False
    compiled: bool = False
    deterministic: bool = True
    finite: bool = True
    corruption: bool = True
    alter: Callable[[Sequence[Decoder], World], None] | None = None


@dataclass(frozen=True)
class Done:
    """What one rank got from a step."""

    loss: float
    reports: list[Report]
    finding: Finding | None
    outcome: Outcome | None
    gradients: list[Tensor]


class Training:
    def __init__(self, run: Run) -> None:
        torch.use_deterministic_algorithms(run.deterministic)
        self.run = run
        self.world = world = join(run.parallel, "cpu")
        self.parts = build_parts(run, world)
        if run.alter is not None:
            run.alter(self.parts, world)
        self.watch = Watch(
            self.parts,
            run.args.layers,
            finite=run.finite,
            corruption=run.corruption,
            drill=Drill(run.orders, world.rank) if run.orders else None,
        )
        self.optimizer = torch.optim.SGD([p for _, p in self.watch.parameters], lr=1e-3)
        self.passes: Passes = (
            PipelinePasses(
                self.parts,
                world.mesh["pp"].get_group(),
                world.device,
                schedule=run.parallel.schedule,
                samples=1,
                length=LENGTH,
                dtype=torch.float32,
                masked=False,
            )
            if world.layout.pipeline > 1
            else Accumulation(self.parts[0], masked=False)
        )
        self.replay = Replay(self.passes, self.watch, world)
        self.units = [world.layout.unit(rank) for rank in range(world.size)]

    def step(self, step: int, *, replay: bool = False, suspicion: Finding | None = None) -> Done:
        """`replay`: at an interval, so the step is digested whole. A suspicion comes after the step."""
        self.optimizer.zero_grad()
        mine = batches(self.run, step, self.world.layout.data_rank(self.world.rank))
        ranks = self.world.layout.data_ranks
        tokens = ranks * self.run.micro_batches * LENGTH
        totals = Totals(tokens, tokens, tokens // LENGTH, {})
        self.watch.begin(step, digests=replay)
        passed = self.passes(mine, totals)
        rows = self.world.gather([*self.watch.finish(passed).words(), passed.loss.item()])
        reports = [Report.of(row) for row in rows]
        finding = attribute(
            step,
            reports,
            self.units,
            layers=self.run.args.layers,
            expert=self.world.layout.expert,
        )
        outcome = None
        if replay or suspicion is not None:
            outcome = self.replay(step, mine, totals, passed, suspicion=suspicion)
        held = [p.grad for _, p in self.watch.parameters if p.grad is not None]
        if finding is None:
            self.optimizer.step()
        return Done(
            sum(row[-1] for row in rows),
            reports,
            finding,
            outcome,
            [local(gradient).clone() for gradient in held],
        )


def steps(
    run: Run, numbers: Sequence[int], replays: Sequence[int] = (), suspected: Finding | None = None
) -> Any:
    """On one rank: each step's result. `suspected`: leads to a replay of the last one."""
    training = Training(run)
    done = [
        training.step(n, replay=n in replays, suspicion=suspected if n == numbers[-1] else None)
        for n in numbers
    ]
    training.world.close()
    return [replace(d, outcome=_sendable(d.outcome)) for d in done]


def config_of(run: Run) -> Config:
    return Config(
        model=run.args,
        data=Data(seq_len=LENGTH),
        parallel=run.parallel.model_copy(
            update={
                "recompute": Recompute.BLOCK if run.recompute else Recompute.NONE,
                "compile": run.compiled,
            }
        ),
        run=schema.Run(seed=1),
    )


def build_parts(run: Run, world: World) -> list[Decoder]:
    layout = world.layout
    if layout.pipeline == 1:
        held: tuple[Stage, ...] = (Stage.whole(run.args),)
    else:
        kind = run.parallel.schedule
        per_rank = stages.stages_per_rank(run.parallel.stages_per_rank, kind)
        split = stages.stages(run.args, layout.pipeline, per_rank, kind, sequence=LENGTH)
        held = split[layout.place(world.rank).pipeline]
    return [build(run.args, stage, world, config_of(run)) for stage in held]


def batches(run: Run, step: int, data_rank: int) -> list[Batch]:
    made = []
    for number in range(run.micro_batches):
        seed = (step * 1009 + data_rank) * 101 + number
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(run.args.vocab_size, (1, LENGTH + 1), generator=generator)
        zeros = torch.zeros(1, LENGTH, dtype=torch.int64)
        positions = torch.arange(LENGTH).unsqueeze(0)
        made.append(
            Batch((seed,), tokens[:, :-1].clone(), tokens[:, 1:].clone(), zeros + 1, zeros, positions)
        )
    return made


def _sendable(outcome: Outcome | None) -> Outcome | None:
    return None if outcome is None else replace(outcome, passed=replace(outcome.passed, counts={}))


def layout(**degrees: Any) -> Parallel:
    return Parallel(timeout_seconds=30, **degrees)
