"""One rank: forward and backward passes of an MoE layer with each exchange in turn.

Started by `benchmarks.exchange` in a node's namespace with a Setup as JSON; rank 0 writes the samples.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.exchange.network import INTERFACE
from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.experts import Experts
from ltf.model.moe import MoE, TokenExchange
from ltf.parallel.crossing import Crossing, rows_of
from ltf.parallel.exchange import FlatExchange
from ltf.parallel.topology import TopologyExchange, node_map


@dataclass(frozen=True)
class Setup:
    nodes: int = 2
    ranks: int = 2
    """Of each node."""
    experts: int = 32
    top_k: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 512
    """Of each rank."""
    width: int = 256
    hidden: int = 64
    """Of an expert."""
    dtype: str = "float32"
    rate: str = "200mbit"
    """Of each node's interface, each way."""
    rounds: int = 5
    steps: int = 2
    """In a sample."""

    @property
    def world(self) -> int:
        return self.nodes * self.ranks

    @property
    def node_of(self) -> list[int]:
        return [rank // self.ranks for rank in range(self.world)]


@dataclass(frozen=True)
class Sample:
    """Of one step. `link_bytes`: sent by all nodes' interfaces, headers included."""

    exchange: str
    top_k: int
    seconds: float
    link_bytes: float
    rows: Crossing
    """What the routing lets expect of each exchange."""


def layer(setup: Setup, top_k: int, rank: int) -> MoE:
    args = ModelArgs(
        vocab_size=64, layers=1, width=setup.width, heads=1, kv_heads=1, head_dim=setup.width,
        moe=MoEArgs(
            experts=setup.experts, top_k=top_k, expert_width=setup.hidden, renormalise=top_k > 1
        ),
    )  # fmt: skip
    with torch.device("meta"):
        module = MoE(args, 0)
    module.experts = Experts(setup.experts // setup.world, setup.width, setup.hidden)
    module.router.to_empty(device="cpu")
    nn.init.normal_(module.router.weight, generator=torch.Generator().manual_seed(top_k))
    for parameter in module.experts.parameters():
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(100 + rank))
    return module.to(getattr(torch, setup.dtype))


def measure(setup: Setup) -> list[Sample]:
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    exchanges: dict[str, TokenExchange] = {
        "flat": FlatExchange(group),
        "topology": TopologyExchange(group, node_map([str(node) for node in setup.node_of])),
    }
    layers = {top_k: layer(setup, top_k, rank) for top_k in setup.top_k}
    shape = (1, setup.tokens, setup.width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(getattr(torch, setup.dtype))
    samples = []
    crossing = {top_k: _crossing(module, x, setup, rank) for top_k, module in layers.items()}
    for number in range(-1, setup.rounds):  # the first warms up and compares
        for top_k, module in layers.items():
            outputs = []
            for name, exchange in exchanges.items():
                module.exchange = exchange
                seconds, sent = _timed(lambda module=module: _steps(module, x, setup.steps))  # type: ignore[misc]
                if number >= 0:
                    samples.append(
                        Sample(name, top_k, seconds / setup.steps, sent / setup.steps, crossing[top_k])
                    )
                else:
                    with torch.no_grad():
                        outputs.append(module(x)[0])
            if outputs:
                bits = torch.finfo(outputs[0].dtype).eps
                torch.testing.assert_close(outputs[1], outputs[0], rtol=64 * bits, atol=64 * bits)
    return samples


def _steps(module: MoE, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        module.zero_grad()
        out, _ = module(x.detach().requires_grad_())
        out.float().square().mean().backward()


def _crossing(module: MoE, x: Tensor, setup: Setup, rank: int) -> Crossing:
    with torch.no_grad():
        mine = rows_of(module.router(x).experts, setup.experts, setup.node_of, rank)
    return Crossing(*_sum(mine.flat, mine.topology))


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds between two barriers, and the bytes that all nodes sent meanwhile."""
    dist.barrier()
    sent, started = _sent_bytes(), time.perf_counter()
    work()
    dist.barrier()
    seconds, sent = time.perf_counter() - started, _sent_bytes() - sent
    first_of_node = int(os.environ["LOCAL_RANK"]) == 0
    return seconds, _sum(sent if first_of_node else 0)[0]


def _sum(*values: float) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    numbers: list[float] = total.tolist()
    return numbers


def _sent_bytes() -> int:
    """Of this namespace's interface since it was made; /proc/net is that of the reader, /sys need not be."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise SystemExit(f"there is no interface {INTERFACE} here: benchmarks.exchange starts its ranks itself")


def main() -> None:
    fields = json.loads(sys.argv[1])
    setup = Setup(**{**fields, "top_k": tuple(fields["top_k"])})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    samples = measure(setup)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps([asdict(sample) for sample in samples]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
