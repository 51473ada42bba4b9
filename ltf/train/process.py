"""One process of a run from its joining to its exit status."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ltf.checkpoint.saver import LeaveTraining, Stopped
from ltf.config.agreement import check_data, check_world
from ltf.config.schema import Config
from ltf.events import ExitReason
from ltf.kernels import chosen
from ltf.noise import drop_page_cache
from ltf.parallel.world import PeersGone, World, join, lost_peers
from ltf.train.checkpoints import folder_of
from ltf.train.lock import Lock, make
from ltf.train.loop import Trainer
from ltf.train.mistakes import BROKEN, MISTAKES, status_of
from ltf.train.report import Report
from ltf.train.together import Refused, together

INTERRUPTED = 130


def run(config: Config) -> int:
    """The exit status: see `ltf.train.command.main`."""
    # Told only to warn, torch's fused attention on accelerators takes a backward pass that varies; told after
    # it joined, NCCL has chosen reductions that do.
    torch.use_deterministic_algorithms(config.run.deterministic)
    try:
        world = join(config.parallel, config.run.device)
    except PeersGone as error:
        return _said(f"error: {error}", 1)
    except MISTAKES as error:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        return _said(f"error: {error}" if first else "", status_of(error))
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    try:
        return _joined(config, world)
    finally:
        world.close()


@dataclass(frozen=True)
class Ending:
    """`everywhere`: each rank says the message, not the first of its node alone."""

    status: int
    reason: ExitReason
    message: str = ""
    everywhere: bool = False

    def said(self, world: World) -> int:
        return _said(self.message if self.everywhere or world.local_rank == 0 else "", self.status)


def _joined(config: Config, world: World) -> int:
    with ExitStack() as stack:
        try:
            report = _prepared(config, world, stack)
        except Exception as error:  # noqa: BLE001 - shown whole
            return _ending(error, world).said(world)
        try:
            _train(config, world, report)
            ending = Ending(0, ExitReason.FINISHED)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - shown whole, and the events have it
            ending = _ending(error, world)
        report.exited(ending.status, ending.reason, ending.message)
        return ending.said(world)


def _prepared(config: Config, world: World, stack: ExitStack) -> Report:
    """What must be right before anything is written; the folders are then this run's alone."""
    folders = [config.run.output, folder_of(config)]

    def check() -> None:
        check_data(config)
        check_world(config, world.size)
        make(folders)

    together(world, check)
    lock = together(world, lambda: Lock(folders, config.run.name) if world.rank == 0 else None)
    if lock is not None:
        stack.enter_context(lock)
    report = stack.enter_context(together(world, lambda: Report(config, world)))
    if lock is not None:
        report.findings(lock.findings)
    return report


def _train(config: Config, world: World, report: Report) -> None:
    if config.noise.drop_page_cache and world.local_rank == 0:
        report.own_finding(drop_page_cache())
    with chosen(config.precision.attention_kernel, config.precision.experts_kernel):
        Trainer(config, world, report).run()


def _ending(error: BaseException, world: World) -> Ending:
    """What an error means for this process, with one line for people, or a traceback of a defect."""
    match error:
        case Stopped():
            return Ending(error.status, ExitReason.SIGNAL, str(error))
        case LeaveTraining():
            return Ending(error.status, ExitReason.GUARD, f"error: {error}", error.status == BROKEN)
        case KeyboardInterrupt():
            return Ending(INTERRUPTED, ExitReason.SIGNAL, "interrupted")
        case Refused():
            said = f"error: {error}" if str(error) else ""
            return Ending(error.status, ExitReason.ERROR, said, everywhere=True)
        case PeersGone():
            return Ending(BROKEN, ExitReason.ERROR, f"error: {error}", everywhere=True)
    if isinstance(error, MISTAKES):
        # Of what is the same on all ranks.
        return Ending(status_of(error), ExitReason.ERROR, f"error: {error}")
    if lost_peers(error):
        return Ending(BROKEN, ExitReason.ERROR, f"error: {world.alone(error)}", everywhere=True)
    trace = "".join(traceback.format_exception(error))
    return Ending(BROKEN, ExitReason.ERROR, f"rank {world.rank} failed:\n{trace}", everywhere=True)


def _said(text: str, status: int) -> int:
    if text:
        print(text, file=sys.stderr, flush=True)
    return status
