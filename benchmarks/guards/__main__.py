"""What the always-on guards cost: CPU time of a step's passes and update without them, and with each.

    python -m benchmarks.guards [--rounds 12] [--shape middle]

One process, one thread, one model. The variants take turns step by step, in random order. The figure is the
least CPU time (not wall time) of a variant's steps beside the least without guards: what other work on the
machine adds, through shared caches and memory, is never negative. Medians stand beside it. `finite, gradients
digested` is what `python -m ltf train` does in every step unless told otherwise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, replace

import torch

from ltf.data.loader import Batch
from ltf.guard.finite import attribute
from ltf.guard.watch import Watch
from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from ltf.passes import Totals
from ltf.train.accumulation import Accumulation

TINY = ModelArgs(
    vocab_size=272,
    layers=4,
    width=96,
    heads=6,
    kv_heads=2,
    head_dim=16,
    moe=MoEArgs(experts=8, top_k=2, expert_width=96),
)
MIDDLE = replace(
    TINY,
    vocab_size=4096,
    layers=6,
    width=384,
    heads=6,
    head_dim=64,
    moe=MoEArgs(experts=16, top_k=2, expert_width=384),
)
SHAPES = {"tiny": (TINY, 8, 128, 2), "middle": (MIDDLE, 2, 512, 4)}
"""Of each: samples in a micro-batch, their length in tokens, and micro-batches in a step."""
WARM_UP = 1


@dataclass(frozen=True)
class Variant:
    corruption: bool
    digests: bool = False


VARIANTS = {
    "none": None,
    "finite": Variant(corruption=False),
    "finite, gradients digested": Variant(corruption=True),
    "everything digested (a step before a replay)": Variant(corruption=True, digests=True),
}


class Rank:
    """One model, so that no variant has luckier memory; the hooks of those whose turn it is not are quiet."""

    def __init__(self, args: ModelArgs) -> None:
        self.model = Decoder(args)
        init_weights(self.model, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.passes = Accumulation(self.model, masked=False)
        self.watches = {
            corruption: Watch([self.model], args.layers, corruption=corruption)
            for corruption in (False, True)
        }

    def step(self, number: int, variant: Variant | None, batches: list[Batch], totals: Totals) -> float:
        """CPU seconds."""
        watch = None if variant is None else self.watches[variant.corruption]
        began = time.process_time()
        self.optimizer.zero_grad()
        if watch is not None and variant is not None:
            watch.begin(number, digests=variant.digests)
        passed = self.passes(batches, totals)
        if watch is not None:
            report = watch.finish(passed)
            assert attribute(number, [report], [0], layers=self.model.args.layers) is None
        else:
            passed.loss.item()
        self.optimizer.step()
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in options.shape or SHAPES:
        args, samples, length, micro = SHAPES[name]
        batches = [batch(args, samples, length, seed) for seed in range(micro)]
        tokens = samples * length * micro
        totals = Totals(tokens, tokens, samples * micro, {})
        rank, chance = Rank(args), random.Random(0)
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for number in range(options.rounds + WARM_UP):
            for variant in chance.sample(sorted(VARIANTS), len(VARIANTS)):
                taken = rank.step(number, VARIANTS[variant], batches, totals)
                if number >= WARM_UP:
                    seconds[variant].append(taken)
        print(f"{name}: {args.layers} layers, width {args.width}, {tokens} tokens a step")
        for variant, took in seconds.items():
            base = seconds["none"]
            more = 100 * (min(took) / min(base) - 1)
            middle = 100 * (statistics.median(took) / statistics.median(base) - 1)
            print(f"  {variant:46} {1e3 * min(took):9.2f} ms  {more:+6.2f} %  (medians {middle:+.2f} %)")


def batch(args: ModelArgs, samples: int, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(args.vocab_size, (samples, length + 1), generator=generator)
    zeros = torch.zeros(samples, length, dtype=torch.int64)
    positions = torch.arange(length).expand(samples, length)
    return Batch((seed,), tokens[:, :-1].clone(), tokens[:, 1:].clone(), zeros + 1, zeros, positions)


if __name__ == "__main__":
    main()
