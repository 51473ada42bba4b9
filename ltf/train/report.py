"""Tells what happens: into the events of this rank, and on rank 0 to people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Self

import torch

from ltf import events, lines, metrics
from ltf.config.schema import Config, Dtype
from ltf.findings import Finding
from ltf.heart import Heart
from ltf.model.count import count_parameters, token_flops
from ltf.parallel.world import World

TORCH_DTYPES = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16}


class Report:
    """`heart` knows what the training thread is at. Use it as a context."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        folder = config.run.output
        self.writer = events.Writer(folder, world.rank, config.run.name)
        self.heart = Heart(self.writer, config.output.heartbeat_seconds)
        self.roster = tuple(events.Where(each.rank, each.node, each.device) for each in world.roster)
        self.first = world.rank == 0
        self.lines = lines.Lines(config.output.log_every, config.run.steps, world.size)
        self.board = None
        if config.output.tensorboard and self.first:
            self.board = lines.Board(folder / "tensorboard")
        self.flops = token_flops(config.model, config.data.seq_len).training
        dtype = TORCH_DTYPES[config.precision.compute]
        self.peak = metrics.find_peak(config.output.peak_flops, world.device, dtype)

    def started(self, first_step: int) -> None:
        """The run as it is about to begin or go on."""
        config, world = self.config, self.world
        count = count_parameters(config.model)
        layout = {
            "pipeline": world.layout.pipeline,
            "replicate": world.layout.replicate,
            "shard": world.layout.shard,
            "expert": world.layout.expert,
        }
        self.writer.write(
            events.RunStarted(
                where=self.roster[world.rank],
                world=world.size,
                pid=os.getpid(),
                steps=config.run.steps,
                versions={"python": platform.python_version(), "torch": torch.__version__},
                roster=self.roster if self.first else None,
                config=config.model_dump(mode="json") if self.first else None,
                layout=layout if self.first else None,
                model={"parameters": count.total, "active": count.active} if self.first else None,
            )
        )
        if self.first:
            self.lines.start(
                lines.Start(
                    run=self.writer.run,
                    attempt=self.writer.attempt,
                    first_step=first_step + 1,
                    steps=config.run.steps,
                    parameters=count.total,
                    active_parameters=count.active,
                    layout=layout,
                    world=world.size,
                    device=metrics.device_name(world.device) or world.device.type,
                    dtype=config.precision.compute,
                    samples=config.batch.samples,
                    micro=config.batch.micro,
                    seq_len=config.data.seq_len,
                    token_flops=self.flops,
                    peak=self.peak,
                )
            )

    def step(self, event: events.Step) -> None:
        """Rank 0's account of a step; loads and stalls are of this step alone."""
        if not self.first:
            return
        self.writer.write(event)
        progress = lines.Progress(
            step=event.step,
            loss=event.loss,
            norm=event.gradient_norm,
            lr=event.lr or 0.0,
            tokens=event.tokens,
            seconds=event.seconds,
            mfu=event.mfu,
            memory=event.memory_bytes or 0,
            data_stall=event.data_stall_seconds or 0.0,
            checkpoint_stall=event.checkpoint_stall_seconds or 0.0,
            balance=event.balance_loss,
            expert_load=event.expert_load,
            skipped=event.skipped,
        )
        self.lines.progress(progress)
        if self.board is not None:
            self.board.progress(progress)

    def finding(self, finding: Finding) -> None:
        """One that all ranks found alike: told once."""
        if self.first:
            self._tell(finding)

    def own_finding(self, finding: Finding) -> None:
        """One of this rank or its node alone."""
        self._tell(finding)

    def findings(self, found: Sequence[Finding]) -> None:
        for finding in found:
            self.finding(finding)

    def event(self, event: events.Event) -> None:
        """One that concerns the run: told once."""
        if self.first:
            self.writer.write(event)

    def evaluation(self, event: events.Evaluation) -> None:
        self.event(event)
        self.say(
            f"evaluation at step {event.step}: loss {event.loss:.4f} over {event.tokens} held-out tokens"
        )

    def killed(self, status: int) -> None:
        """The last word of a process that ends without its training thread, after a save on a signal."""
        self.exited(status, events.ExitReason.SIGNAL, "told to end; this process did not wait for its step")

    def exited(self, status: int, reason: events.ExitReason, message: str) -> None:
        self.writer.write(events.Exited(self.heart.step, status, reason, message))

    def say(self, text: str) -> None:
        if self.first:
            self.lines.say(text)

    def mfu(self, tokens_per_second: float) -> float | None:
        return metrics.mfu(tokens_per_second, self.flops, self.world.size, self.peak)

    def _tell(self, finding: Finding) -> None:
        where = tuple(self.roster[rank] for rank in finding.ranks)
        self.writer.write(events.Found.of(finding, where))
        self.lines.finding(finding, where)

    def __enter__(self) -> Self:
        self.heart.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.heart.__exit__(None, None, None)
        if self.board is not None:
            self.board.close()
        self.writer.close()
