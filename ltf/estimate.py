"""``python -m ltf estimate CONFIG``: parameters, memory, operations and checkpoint size, before any is spent.

By arithmetic alone: torch is not imported and nothing is allocated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ltf.config import agreement
from ltf.config.read import read
from ltf.config.schema import Config
from ltf.memory import FP32, Memory, micro_batches, of_rank
from ltf.model.count import ParameterCount, TokenFlops, count_parameters, token_flops
from ltf.parallel.layout import Layout
from ltf.parallel.stages import stages

PARTS = {
    "embedding": "embedding",
    "head": "head",
    "norms": "norms",
    "attention": "attention",
    "dense": "dense feed-forward",
    "routers": "routers",
    "shared_experts": "shared experts",
    "experts": "experts",
}
MEMORY = {
    "parameters": "parameters, fp32 master copy",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer, two moments",
    "gathered": "gathered parameters",
    "unreduced": "gradients before reduction",
    "activations": "activations",
    "logits": "logits and loss",
}


@dataclass(frozen=True)
class Estimate:
    """`memory`: of each pipeline rank. `causal` counts half of the attention, `full` all of it.

    `checkpoint_bytes`: fp32 parameters and two moments; the rest of a checkpoint is small beside them.
    """

    world: int
    layout: Layout
    parameters: ParameterCount
    memory: tuple[Memory, ...]
    causal: TokenFlops
    full: TokenFlops
    tokens_a_step: int
    micro_batches: int
    checkpoint_bytes: int

    @property
    def largest(self) -> int:
        """The pipeline rank that needs most."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)


def smallest_world(config: Config) -> int:
    """Ranks that the degrees ask for at least: where `shard` takes the rest, as many as `expert`."""
    parallel = config.parallel
    shard = parallel.expert if parallel.shard == "rest" else parallel.shard
    return parallel.pipeline * parallel.replicate * shard


def estimate(config: Config, world: int | None = None) -> Estimate:
    """For `world` ranks, or for as few as the degrees allow. ConfigError if they or the batch do not fit."""
    ranks = smallest_world(config) if world is None else world
    layout = agreement.check_world(config, ranks)
    args, length = config.model, config.data.seq_len
    held = stages(
        args,
        layout.pipeline,
        agreement.stages_per_rank(config),
        config.parallel.schedule,
        sequence=length,
    )
    parameters = count_parameters(args)
    return Estimate(
        world=ranks,
        layout=layout,
        parameters=parameters,
        memory=tuple(of_rank(config, layout, rank, one) for rank, one in enumerate(held)),
        causal=token_flops(args, length),
        full=token_flops(args, length, causal=False),
        tokens_a_step=config.batch.samples * length,
        micro_batches=micro_batches(config, layout),
        checkpoint_bytes=3 * FP32 * parameters.total,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. ConfigError leaves it for the caller to show."""
    options = _parser().parse_args(argv)
    found = estimate(read(options.config, options.set), options.world)
    print(json.dumps(as_json(found)) if options.json else table(found))
    return 0


def as_json(found: Estimate) -> dict[str, Any]:
    """Counts are parameters, sizes bytes, operations FLOPs a token."""
    return {
        "schema": "ltf/estimate/1",
        "world": found.world,
        "layout": asdict(found.layout),
        "parameters": {
            "total": found.parameters.total,
            "active": found.parameters.active,
            **asdict(found.parameters),
        },
        "memory": {
            "largest": {
                "pipeline_rank": found.largest,
                "total": found.memory[found.largest].total,
                **asdict(found.memory[found.largest]),
            },
            "pipeline_ranks": [one.total for one in found.memory],
        },
        "flops": {
            name: {"forward": flops.forward, "training": flops.training}
            for name, flops in (("causal", found.causal), ("full", found.full))
        },
        "tokens_a_step": found.tokens_a_step,
        "micro_batches": found.micro_batches,
        "checkpoint_bytes": found.checkpoint_bytes,
    }


def table(found: Estimate) -> str:
    """For people: one figure a line."""
    layout, count, largest = found.layout, found.parameters, found.memory[found.largest]
    degrees = f"pipeline {layout.pipeline} x replicate {layout.replicate} x shard {layout.shard}"
    stage = f", pipeline rank {found.largest}" if layout.pipeline > 1 else ""
    rows: list[tuple[str, str]] = [
        ("Parameters", ""),
        ("  total", _amount(count.total)),
        ("  active", _amount(count.active)),
        ("  active, without embedding and head", _amount(count.active - count.embedding - count.head)),
    ]
    rows += [
        (f"  {label}", _amount(getattr(count, name))) for name, label in PARTS.items() if getattr(count, name)
    ]
    rows += [
        (f"Memory of a rank, the largest{stage}", ""),
        ("  total", _bytes(largest.total)),
        *((f"  {label}", _bytes(getattr(largest, name))) for name, label in MEMORY.items()),
    ]
    rows += [
        ("Operations a token", ""),
        ("  forward, causal attention", _flops(found.causal.forward)),
        ("  training, causal attention", _flops(found.causal.training)),
        ("  forward, full attention", _flops(found.full.forward)),
        ("  training, full attention", _flops(found.full.training)),
        ("Step", ""),
        ("  tokens", f"{found.tokens_a_step:,}"),
        ("  operations, causal attention", _flops(found.causal.training * found.tokens_a_step)),
        ("  micro-batches a data rank", f"{found.micro_batches:,}"),
        ("Checkpoint", _bytes(found.checkpoint_bytes)),
    ]
    width = max(len(label) for label, _ in rows)
    figures = max(len(value) for _, value in rows)
    lines = [f"{label:<{width}}  {value:>{figures}}".rstrip() for label, value in rows]
    ranks = f"{found.world} rank{'' if found.world == 1 else 's'}"
    notes = "Not counted: fragmentation, workspaces of kernels and collectives, the optimizer's temporaries."
    return "\n".join([f"{ranks}: {degrees}, expert {layout.expert}", "", *lines, "", notes])


def _amount(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 2**10:.2f} KiB" if number else "0"


def _flops(number: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 1e6:.2f} MFLOP"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ltf estimate",
        description="What a configuration needs, by arithmetic alone.",
        epilog="example: python -m ltf estimate qwen3-30b-a3b --world 64 --set batch.micro=2",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; may come again"
    )
    parser.add_argument("--world", type=_positive, metavar="N", help="ranks; default: as few as possible")
    parser.add_argument("--json", action="store_true")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
