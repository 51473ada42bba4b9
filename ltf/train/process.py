"""One process of a run from its joining to its exit status."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack

import torch

from ltf.checkpoint.load import LoadError
from ltf.checkpoint.saver import EXIT_STATUS, LeaveTraining, Stopped
from ltf.config.agreement import check_data, check_world
from ltf.config.errors import ConfigError
from ltf.config.schema import Config
from ltf.data.errors import DataError
from ltf.events import ExitReason
from ltf.guard.drill import DrillError
from ltf.kernels import chosen
from ltf.model.args import ModelArgsError
from ltf.model.hf_config import HfError
from ltf.noise import drop_page_cache
from ltf.parallel.layout import LayoutError
from ltf.parallel.stages import StagesError
from ltf.parallel.world import PeersGone, World, WorldError, join, lost_peers
from ltf.train.loop import Trainer
from ltf.train.report import Report
from ltf.train.together import OthersFailed

INTERRUPTED = 130
# What a person can mend; one line says how.
MISTAKES = (
    ConfigError,
    DataError,
    DrillError,
    HfError,
    LayoutError,
    LoadError,
    ModelArgsError,
    StagesError,
    WorldError,
)


def run(config: Config) -> int:
    """The exit status: see `ltf.train.command.main`."""
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    try:
        world = join(config.parallel, config.run.device)
    except PeersGone as error:
        return _said(f"error: {error}", 1)
    except MISTAKES as error:
        return _said(f"error: {error}", 2)
    try:
        return _joined(config, world)
    finally:
        world.close()


def _joined(config: Config, world: World) -> int:
    with ExitStack() as stack:
        try:
            check_data(config)
            check_world(config, world.size)
            report = stack.enter_context(Report(config, world))
        except MISTAKES as error:
            return _said(f"error: {error}" if world.rank == 0 else "", 2)
        status, reason, message = _trained(config, world, report)
        report.exited(status, reason, message)
        if message and (world.rank == 0 or status == 1):
            _said(message, status)
        return status


def _trained(config: Config, world: World, report: Report) -> tuple[int, ExitReason, str]:
    """How it ended: exit status, reason, and for people one line or a traceback."""
    try:
        if config.noise.drop_page_cache and world.local_rank == 0:
            report.own_finding(drop_page_cache())
        with chosen(config.precision.attention_kernel, config.precision.experts_kernel):
            Trainer(config, world, report).run()
    except Stopped as stopped:
        return EXIT_STATUS, ExitReason.SIGNAL, str(stopped)
    except LeaveTraining as left:
        return left.status, ExitReason.GUARD, f"error: {left}"
    except KeyboardInterrupt:
        return INTERRUPTED, ExitReason.SIGNAL, "interrupted"
    except MISTAKES as error:
        return 2, ExitReason.ERROR, f"error: {error}"
    except OthersFailed as error:
        return 2, ExitReason.ERROR, f"rank {world.rank} ends: {error}" if world.rank == 0 else ""
    except PeersGone as error:
        return 1, ExitReason.ERROR, f"error: {error}"
    except Exception as error:  # noqa: BLE001 - a defect is shown whole, and the events tell that this rank ended
        if lost_peers(error):
            return 1, ExitReason.ERROR, f"error: {world.alone(error)}"
        return 1, ExitReason.ERROR, f"rank {world.rank} failed:\n{traceback.format_exc()}"
    return 0, ExitReason.FINISHED, ""


def _said(text: str, status: int) -> int:
    if text:
        print(text, file=sys.stderr, flush=True)
    return status
