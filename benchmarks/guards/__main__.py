"""What the always-on guards cost: CPU time of a step's passes and update without them, and with each.

    python -m benchmarks.guards [--steps 60]

One process, one thread. The variants take turns step by step, so what else the machine does hits them alike;
the figure is the median over steps of CPU time (not wall time), relative to the median without guards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

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
SHAPES = {"tiny preset": (TINY, 8, 128, 2), "middle": (MIDDLE, 2, 256, 2)}
VARIANTS = {
    "none": None,
    "finite": {"finite": True, "corruption": False},
    "finite, gradients digested": {"finite": True, "corruption": True},
    "everything digested (a step before a replay)": {"finite": True, "corruption": True, "digests": True},
}


class Rank:
    """A model of its own under one variant."""

    def __init__(self, args: ModelArgs, options: dict[str, bool] | None) -> None:
        self.model = Decoder(args)
        init_weights(self.model, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.passes = Accumulation(self.model, masked=False)
        options = dict(options) if options is not None else None
        self.digests = options.pop("digests", False) if options is not None else False
        self.watch = Watch([self.model], args.layers, **options) if options is not None else None

    def step(self, number: int, batches: list[Batch], totals: Totals) -> float:
        """CPU seconds."""
        began = time.process_time()
        self.optimizer.zero_grad()
        if self.watch is not None:
            self.watch.begin(number, digests=self.digests)
        passed = self.passes(batches, totals)
        if self.watch is not None:
            report = self.watch.finish(passed)
            assert attribute(number, [report], [0], layers=self.model.args.layers) is None
        else:
            passed.loss.item()
        self.optimizer.step()
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, (args, samples, length, micro) in SHAPES.items():
        batches = [batch(args, samples, length, seed) for seed in range(micro)]
        tokens = samples * length * micro
        totals = Totals(tokens, tokens, samples * micro, {})
        ranks = {variant: Rank(args, options) for variant, options in VARIANTS.items()}
        seconds: dict[str, list[float]] = {variant: [] for variant in ranks}
        for number in range(steps + 3):
            for variant, rank in ranks.items():
                took = rank.step(number, batches, totals)
                if number >= 3:
                    seconds[variant].append(took)
        base = statistics.median(seconds["none"])
        print(f"{name}: {args.layers} layers, width {args.width}, {tokens} tokens a step")
        for variant, took in seconds.items():
            median = statistics.median(took)
            print(f"  {variant:48} {1e3 * median:9.2f} ms  {100 * (median / base - 1):+6.2f} %")


def batch(args: ModelArgs, samples: int, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(args.vocab_size, (samples, length + 1), generator=generator)
    zeros = torch.zeros(samples, length, dtype=torch.int64)
    positions = torch.arange(length).expand(samples, length)
    return Batch((seed,), tokens[:, :-1].clone(), tokens[:, 1:].clone(), zeros + 1, zeros, positions)


if __name__ == "__main__":
    main()
