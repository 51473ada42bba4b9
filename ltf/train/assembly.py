"""The model of a run on this rank, and what moves it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from ltf.config.schema import Config
from ltf.model.args import Stage
from ltf.model.decoder import Decoder
from ltf.optim import adamw
from ltf.parallel.pipeline import PipelinePasses
from ltf.parallel.shard import build, named_shards, token_exchange
from ltf.parallel.stages import stages, stages_per_rank
from ltf.parallel.world import World
from ltf.train.accumulation import Accumulation
from ltf.train.loads import Loads
from ltf.train.report import TORCH_DTYPES

Trainable = PipelinePasses | Accumulation


@dataclass(frozen=True)
class Model:
    """`parts`: one, or this rank's pipeline stages in order. `parameters`: sharded, by name in the whole
    model; the same objects for the life of the run."""

    parts: tuple[Decoder, ...]
    parameters: tuple[tuple[str, Tensor], ...]
    passes: Trainable
    optimizer: AdamW
    loads: Loads


def assemble(
    config: Config,
    world: World,
    *,
    elsewhere: Callable[[], AbstractContextManager[None]] = nullcontext,
    between: Callable[[], None] = lambda: None,
) -> Model:
    """`elsewhere`: entered around the collectives of the token exchange. `between`: called between
    micro-batches, where this rank can leave a step by itself."""
    exchange = token_exchange(world, config, elsewhere) if world.layout.expert > 1 else None
    parts = tuple(
        build(config.model, stage, world, config, exchange=exchange) for stage in own_stages(config, world)
    )
    parameters = tuple(item for part in parts for item in named_shards(part))
    return Model(
        parts,
        parameters,
        _passes(config, world, parts, between),
        adamw(parameters, config.optimizer),
        Loads(parts, world.device, data_group(config, world)),
    )


def own_stages(config: Config, world: World) -> tuple[Stage, ...]:
    """This rank's parts of the model; the whole without a pipeline."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return (Stage.whole(config.model),)
    per_rank = stages_per_rank(parallel.stages_per_rank, parallel.schedule)
    cut = stages(config.model, parallel.pipeline, per_rank, parallel.schedule, sequence=config.data.seq_len)
    return cut[world.layout.place(world.rank).pipeline]


def data_group(config: Config, world: World) -> dist.ProcessGroup | None:
    """The ranks that read different samples for the same layers; None if this rank is alone. Collective."""
    layout = world.layout
    if layout.data_ranks == 1:
        return None
    by_stage = [
        [rank for rank in range(layout.world) if layout.place(rank).pipeline == stage]
        for stage in range(layout.pipeline)
    ]
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(by_stage, timeout=timeout)  # type: ignore[no-untyped-call]
    return group


def _passes(
    config: Config, world: World, parts: tuple[Decoder, ...], between: Callable[[], None]
) -> Trainable:
    masked = config.data.mask_boundaries
    if config.parallel.pipeline == 1:
        return Accumulation(parts[0], masked=masked, between=between)
    return PipelinePasses(
        parts,
        world.mesh.get_group("pp"),
        world.device,
        schedule=config.parallel.schedule,
        samples=config.batch.micro,
        length=config.data.seq_len,
        dtype=TORCH_DTYPES[config.precision.compute],
        masked=masked,
    )
