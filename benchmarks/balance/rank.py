"""A rank of the benchmark: steps of a small decoder, gradients accumulated, then summed over ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ltf.balance import Balancer, even, share
from ltf.config import schema
from ltf.data.order import samples_of_step
from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from ltf.passes import Totals, cross_entropy_sum, router_share
from ltf.timing import OwnWork

MODEL = ModelArgs(
    vocab_size=512,
    layers=4,
    width=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn_width=344,
    moe=MoEArgs(experts=8, top_k=2, expert_width=172, dense_layers=2),
)


@dataclass(frozen=True)
class Setup:
    """`cores`: one a rank. `rounds` of `block` static and `block` balanced steps, after `learn` steps."""

    cores: tuple[int, ...]
    rounds: int
    block: int
    learn: int
    samples: int
    micro: int
    sequence: int
    rendezvous: str


@dataclass(frozen=True)
class Block:
    """`block` steps of one kind, by rank 0's clock. `own_ms`: by rank, of a micro-batch's forward pass."""

    mode: str
    seconds: float
    counts: tuple[int, ...]
    own_ms: tuple[float, ...]
    loss: float


def main(rank: int, setup: Setup) -> list[Block]:
    """What the rank measured; the same plan in all of them."""
    os.sched_setaffinity(0, {setup.cores[rank]})
    torch.set_num_threads(1)
    world = len(setup.cores)
    dist.init_process_group("gloo", init_method=setup.rendezvous, rank=rank, world_size=world)
    try:
        return _Rank(rank, world, setup).run()
    finally:
        dist.destroy_process_group()


class _Rank:
    def __init__(self, rank: int, world: int, setup: Setup) -> None:
        self.rank, self.setup = rank, setup
        self.model = Decoder(MODEL)
        init_weights(self.model, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.watch = OwnWork([block for _, block in self.model.blocks()], torch.device("cpu"))
        total = setup.samples // setup.micro
        self.static = even(total, world)
        settings = schema.Balance(mode="auto", every_steps=setup.learn, window=setup.learn)
        self.balancer = Balancer(settings, world, total)
        self.done = 0

    def run(self) -> list[Block]:
        self.steps("auto", self.setup.learn)
        blocks = []
        for _ in range(self.setup.rounds):
            blocks += [self.steps(mode, self.setup.block) for mode in ("static", "auto")]
        return blocks

    def steps(self, mode: str, number: int) -> Block:
        dist.barrier()
        began, own, counts, loss = time.perf_counter(), [], self.static, float("nan")
        for _ in range(number):
            counts = self.balancer.counts if mode == "auto" else self.static
            loss = self.step(counts)
            own.append(self.gathered(self.watch.take().per_row * self.setup.micro))
            if mode == "auto":
                self.balancer.observe(self.done, own[-1])
                self.balancer.replan(self.done)
        seconds = time.perf_counter() - began
        mean = tuple(1000 * sum(each) / number for each in zip(*own, strict=True))
        return Block(mode, seconds, counts, mean, loss)

    def step(self, counts: Sequence[int]) -> float:
        """One optimizer step; the global batch is the same whatever the counts. Its loss."""
        setup = self.setup
        samples = samples_of_step(self.done, setup.samples)
        self.done += 1
        batches = [
            tokens(batch, setup.sequence, MODEL.vocab_size)
            for batch in share(samples, counts, self.rank, micro=setup.micro)
        ]
        loss = accumulate(self.model, batches, setup.samples, setup.sequence)
        self.optimizer.step()
        return loss

    def gathered(self, value: float) -> list[float]:
        all_ranks = [torch.zeros(1, dtype=torch.float64) for _ in self.setup.cores]
        dist.all_gather(all_ranks, torch.tensor([value], dtype=torch.float64))
        return [float(each) for each in all_ranks]


def tokens(samples: Sequence[int], sequence: int, vocabulary: int) -> Tensor:
    """(samples, sequence + 1): a sample's tokens follow from its number alone."""
    return torch.stack(
        [
            torch.randint(vocabulary, (sequence + 1,), generator=torch.Generator().manual_seed(sample))
            for sample in samples
        ]
    )


def accumulate(model: Decoder, batches: Sequence[Tensor], samples: int, sequence: int) -> float:
    """Leave the gradients of the global batch's mean loss, summed over ranks, in the model; return it."""
    totals = Totals(loss_tokens=samples * sequence, tokens=samples * sequence, rows=samples, counts={})
    loss = torch.zeros(())
    for parameter in model.parameters():
        # Every rank sends the same number of elements, also for an expert that met no token.
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches:
        out = model(batch[:, :-1])
        labels = batch[:, 1:]
        part = cross_entropy_sum(out.out, labels, torch.ones_like(labels)) / totals.loss_tokens
        if out.routing and model.args.moe is not None:
            part = part + router_share(out.routing, model.args.moe, totals)[0]
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([loss.view(1), *(gradient.view(-1) for gradient in gradients)])
    dist.all_reduce(flat)
    first = 1
    for gradient in gradients:
        gradient.copy_(flat[first : first + gradient.numel()].view_as(gradient))
        first += gradient.numel()
    return float(flat[0])
