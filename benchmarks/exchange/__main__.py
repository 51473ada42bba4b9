"""Flat and topology-aware exchange side by side, as root: ``python -m benchmarks.exchange``.

Nodes are network namespaces whose interfaces ``tc tbf`` limits to --rate; ranks of a node share its
namespace, and gloo joins them. A step is the forward and backward pass of one MoE layer
(`ltf.model.moe.MoE`). The exchanges take turns within each round; the figures are medians over rounds.
"Expected" is the payload that `ltf.parallel.crossing` computes from the routing; the link's bytes are those
that the nodes' interfaces counted, with the headers of TCP and Ethernet and all acknowledgements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.exchange.network import INTERFACE, Node, nodes
from benchmarks.exchange.rank import Setup
from ltf.parallel.crossing import Crossing, link_bytes

PORT = 29500


@dataclass(frozen=True)
class Row:
    exchange: str
    top_k: int
    step_ms: float
    link_mb: float
    expected_mb: float


def run(setup: Setup, *, timeout: float = 600.0) -> list[Row]:
    """Medians for each top-k and exchange.

    SystemExit with a rank's last words if one fails, or if all are not done in `timeout` seconds.
    """
    with nodes(setup.nodes, setup.rate) as made, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _ranks(setup, made, folder) as processes:
            _wait(processes, folder, time.monotonic() + timeout)
        samples = json.loads((folder / "samples").read_text())
    keys = dict.fromkeys((s["top_k"], s["exchange"]) for s in samples)
    return [
        _row(setup, [s for s in samples if (s["top_k"], s["exchange"]) == key], *reversed(key))
        for key in keys
    ]


def _row(setup: Setup, samples: Sequence[dict[str, object]], exchange: str, top_k: int) -> Row:
    element = torch.empty((), dtype=getattr(torch, setup.dtype)).element_size()
    rows = Crossing(**samples[0]["rows"])  # type: ignore[arg-type]
    # With one expert a token the topology-aware exchange is the flat one.
    expected = getattr(link_bytes(rows, setup.width, element), "flat" if top_k == 1 else exchange)
    middle = {
        name: statistics.median(float(str(sample[name])) for sample in samples)
        for name in ("seconds", "link_bytes")
    }
    return Row(exchange, top_k, 1e3 * middle["seconds"], middle["link_bytes"] / 1e6, expected / 1e6)


@contextmanager
def _ranks(setup: Setup, made: Sequence[Node], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, number in enumerate(setup.node_of):
            launch = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % setup.ranks),
                "WORLD_SIZE": str(setup.world),
                "MASTER_ADDR": made[0].address,
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1",
            }
            program = [sys.executable, "-m", "benchmarks.exchange.rank", json.dumps(asdict(setup))]
            command = ["ip", "netns", "exec", made[number].namespace, *program, str(folder / "samples")]
            with (folder / f"rank{rank}").open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=launch, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll() != 0:
            said = (folder / f"rank{rank}").read_text(errors="replace")[-2000:]
            state = "did not finish" if process.poll() is None else f"ended with {process.returncode}"
            raise SystemExit(f"rank {rank} {state}:\n{said}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Setup()
    for field in fields(Setup):
        default = getattr(defaults, field.name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=str(shown), help=f"default {shown}")
    parser.add_argument("--json", type=Path, help="write setup and rows here")
    options = parser.parse_args()
    setup = _setup(options)
    rows = run(setup)
    print(
        f"{setup.nodes} nodes of {setup.ranks} ranks, {setup.rate} a node, {setup.experts} experts, "
        f"{setup.tokens} tokens a rank of width {setup.width}, {setup.dtype}\n\n{_table(rows)}"
    )
    if options.json:
        document = {"setup": asdict(setup), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _setup(options: argparse.Namespace) -> Setup:
    given: dict[str, object] = {}
    for field in fields(Setup):
        default, text = getattr(Setup(), field.name), getattr(options, field.name)
        try:
            if isinstance(default, tuple):
                given[field.name] = tuple(int(part) for part in text.split(","))
            else:
                given[field.name] = type(default)(text)
        except ValueError:
            raise SystemExit(f"--{field.name.replace('_', '-')} {text}: expected whole numbers") from None
    setup = Setup(**given)  # type: ignore[arg-type]
    if setup.experts % setup.world or not all(1 <= k <= setup.experts for k in setup.top_k):
        raise SystemExit(
            f"--experts {setup.experts}: must be a multiple of {setup.world} ranks, and top-k at most that"
        )
    if setup.nodes < 2 or setup.ranks < 1:
        raise SystemExit("a link between nodes needs --nodes of at least 2, and --ranks of at least 1")
    return setup


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| top-k | flat: link MB a step (expected) | topology: link MB (expected) | ratio "
        "| flat: step ms | topology: step ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = {row.top_k: [r for r in rows if r.top_k == row.top_k] for row in rows}
    for top_k, (flat, topology) in pairs.items():
        lines.append(
            f"| {top_k} | {flat.link_mb:.2f} ({flat.expected_mb:.2f}) "
            f"| {topology.link_mb:.2f} ({topology.expected_mb:.2f}) | {flat.link_mb / topology.link_mb:.2f} "
            f"| {flat.step_ms:.0f} | {topology.step_ms:.0f} | {flat.step_ms / topology.step_ms:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
