"""A few steps of training on whatever ranks there are, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltf.config.schema import Balance, Config, Optimizer, Parallel, Precision, Run
from ltf.model.args import ModelArgs, Stage
from ltf.model.decoder import Decoder
from ltf.optim import adamw
from ltf.parallel import norms, shard
from ltf.parallel.norms import Norms
from ltf.parallel.world import World, join
from ltf.passes import Totals, cross_entropy_sum, router_share
from tests.ltf.model.shapes import moe

# Eight experts of which a token takes two, after a dense layer's worth of attention each; every loss is on.
ARGS = moe(balance_coefficient=1e-2, z_coefficient=1e-3)
SAMPLES, LENGTH = 8, 12


@dataclass(frozen=True)
class Case:
    """`shares`: how many samples each data rank takes; none: equally many.

    `evaluations`: forward passes alone over the rank's samples, before every step.
    """

    parallel: Mapping[str, Any] = field(default_factory=dict)
    args: ModelArgs = ARGS
    steps: int = 3
    precision: Mapping[str, Any] = field(default_factory=dict)
    balance: str = "static"
    shares: Sequence[int] | None = None
    evaluations: bool = False
    initial_weights: Path | None = None

    def config(self) -> Config:
        return Config(
            run=Run(seed=5, device="cpu", initial_weights=self.initial_weights),
            model=self.args,
            parallel=Parallel(timeout_seconds=60, **self.parallel),
            precision=Precision(**self.precision),
            # With a small eps AdamW's first steps are signs of gradients, however small and rounded.
            optimizer=Optimizer(lr=1e-2, clip=0.5, eps=1e-3),
            balance=Balance(mode=self.balance),
        )


@dataclass(frozen=True)
class Trained:
    """Whole tensors by name; `initial` and `final` parameters, `gradients` of the first step, clipped."""

    losses: list[float]
    norms: list[Norms]
    parameter_norms: Norms
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    final: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]


def train(case: Case) -> Trained:
    """Called on every rank; all ranks return the same but for what is on rank 0 alone (the tensors)."""
    config = case.config()
    world = join(config.parallel, config.run.device)
    try:
        return _train(case, config, world)
    finally:
        world.close()


def _train(case: Case, config: Config, world: World) -> Trained:
    model = shard.build(case.args, Stage.whole(case.args), world, config)
    parameters = shard.named_shards(model)
    initial = whole(parameters, world)
    before = norms.parameter_norms(parameters, world, case.args.layers)
    optimizer = adamw(parameters, config.optimizer)
    dtypes: dict[str, torch.dtype] = {name: p.dtype for name, p in parameters}
    watched = _watch_dtypes(model, dtypes)
    losses, found, gradients = [], [], {}
    for step in range(case.steps):
        samples = my_samples(case, world, step)
        if case.evaluations:
            with torch.no_grad():
                for tokens in samples:
                    model(tokens[:, :-1])
            shard.settle(model)
        share = accumulate(model, samples, totals())
        losses.append(sum(row[0] for row in world.gather([share])))
        found.append(norms.gradient_norms(parameters, world, case.args.layers))
        assert config.optimizer.clip is not None
        norms.clip_(parameters, found[-1].total, config.optimizer.clip)
        if step == 0:
            gradients = whole([(n, p.grad) for n, p in parameters if p.grad is not None], world)
        optimizer.step()
        optimizer.zero_grad()
    for handle in watched:
        handle.remove()
    return Trained(losses, found, before, initial, gradients, whole(parameters, world), dtypes)


def accumulate(model: Decoder, micro_batches: Sequence[Tensor], of: Totals) -> float:
    """One step's passes; this rank's share of the mean cross-entropy."""
    assert model.args.moe is not None
    share = 0.0
    for number, tokens in enumerate(micro_batches):
        shard.set_last(model, number == len(micro_batches) - 1)
        out = model(tokens[:, :-1])
        labels = tokens[:, 1:]
        loss = cross_entropy_sum(out.out, labels, torch.ones_like(labels)) / of.loss_tokens
        objective = loss + router_share(out.routing, model.args.moe, of)[0]
        objective.backward()  # type: ignore[no-untyped-call]
        share += loss.item()
    return share


def totals() -> Totals:
    return Totals(SAMPLES * LENGTH, SAMPLES * LENGTH, SAMPLES, {})


def my_samples(case: Case, world: World, step: int) -> list[Tensor]:
    """This rank's micro-batches, each of one sample (1, LENGTH + 1)."""
    generator = torch.Generator().manual_seed(step)
    samples = torch.randint(case.args.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    ranks = world.layout.data_ranks
    shares = case.shares or [SAMPLES // ranks] * ranks
    rank = world.layout.data_rank(world.rank)
    return [samples[i : i + 1] for i in range(sum(shares[:rank]), sum(shares[: rank + 1]))]


def whole(tensors: Sequence[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    gathered = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors}
    return {n: t.detach().clone() for n, t in gathered.items()} if world.rank == 0 else {}


def _watch_dtypes(model: Decoder, dtypes: dict[str, torch.dtype]) -> list[Any]:
    """What the parameters are while a forward pass runs, and what goes into and comes out of the routers."""

    def before(_: Any, inputs: Any) -> None:
        for name, p in model.named_parameters():
            if name.startswith("layers.0."):
                dtypes[f"gathered {name}"] = p.dtype

    def after(_: Any, inputs: Any, routing: Any) -> None:
        dtypes["router weights"] = routing.weights.dtype
        dtypes["hidden"] = inputs[0].dtype

    router = model.routers()[0]
    return [router.register_forward_hook(after), router.register_forward_pre_hook(before)]
