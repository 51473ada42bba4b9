"""One run of the trainer in processes of its own, each held to a core, and what its events tell of it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.balance.busy import compute
from ltf.events import path_of, read

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "vocab_size": 272, "layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_width": 344,
    "moe": {"experts": 8, "top_k": 2, "expert_width": 172, "dense_layers": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """`cores`: one a rank. `learn`: steps before the first plan. `steps`: those after it, which count."""

    cores: tuple[int, ...]
    learn: int
    steps: int
    samples: int
    micro: int
    sequence: int
    corpus: Path
    folder: Path


@dataclass(frozen=True)
class Run:
    """Over the steps that count. `own_ms`: by rank, of a micro-batch's forward pass, median."""

    mode: str
    competitors: int
    tokens_per_second: float
    step_ms: float
    counts: tuple[int, ...]
    own_ms: tuple[float, ...]
    last_loss: float


class RunFailed(Exception):
    """A rank ended badly; what it said."""


def run(setup: Setup, mode: str, competitors: int) -> Run:
    """Competitors begin on the last rank's core when all ranks are about to take their first step."""
    folder = setup.folder / f"run-{len(list(setup.folder.glob('run-*')))}"
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(setup, mode, folder)))
    with ExitStack() as stack:
        ranks = _start(setup, config, folder)
        stack.callback(_end, ranks)
        while not all(path_of(folder, rank).exists() for rank in range(len(ranks))):
            _check(ranks, folder)
            time.sleep(0.02)
        stack.enter_context(_busy(setup.cores[-1], competitors))
        while any(rank.poll() is None for rank in ranks):
            _check(ranks, folder)
            time.sleep(0.1)
        _check(ranks, folder)
    return _told(setup, mode, competitors, list(read(path_of(folder, 0))))


def _config(setup: Setup, mode: str, folder: Path) -> dict[str, Any]:
    return {
        "run": {"steps": setup.learn + setup.steps, "output": str(folder)},
        "model": MODEL,
        "data": {"sources": [{"prefix": str(setup.corpus)}], "seq_len": setup.sequence, "pad": 257},
        "batch": {"samples": setup.samples, "micro": setup.micro},
        # Balanced ranks gather parameters once a step. So do the static ones here: else they would be slower
        # for another reason.
        "parallel": {"reshard": False},
        "optimizer": {"warmup_steps": setup.learn},
        "guard": {"corruption": {"every_steps": None}},
        "checkpoint": {"every_steps": None, "at_end": False},
        # A plan as soon as there is one to make.
        "balance": {"mode": mode, "every_steps": setup.learn, "window": setup.learn, "saved_seconds": 0},
    }


def _start(setup: Setup, config: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank, core in enumerate(setup.cores):
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(setup.cores)),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with (folder / f"rank{rank}.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "ltf", "train", str(config)],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        # Its threads come later, and inherit this.
        os.sched_setaffinity(child.pid, {core})
        ranks.append(child)
    return ranks


def _check(ranks: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    for number, rank in enumerate(ranks):
        if rank.poll() not in (None, 0):
            raise RunFailed(f"rank {number}:\n{(folder / f'rank{number}.log').read_text()}")


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


@contextmanager
def _busy(core: int, number: int) -> Iterator[None]:
    # Forked: a spawned process would import what this one did, and be late.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=compute, args=(core,), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _told(setup: Setup, mode: str, competitors: int, events: list[dict[str, Any]]) -> Run:
    plans = [event for event in events if event["event"] == "balance"]
    steps = [event for event in events if event["event"] == "step"]
    # After the first plan, or where one could have come first.
    first = plans[0]["step"] if plans else setup.learn
    counted = [step for step in steps if step["step"] > first]
    evenly = [setup.samples // setup.micro // len(setup.cores)] * len(setup.cores)
    own = []
    for step in counted:
        before = [plan["counts"] for plan in plans if plan["step"] < step["step"]]
        counts = before[-1] if before else evenly
        own.append([1000 * s / count for s, count in zip(step["own_seconds"], counts, strict=True)])
    seconds = sum(step["seconds"] for step in counted)
    return Run(
        mode,
        competitors,
        tokens_per_second=sum(step["tokens"] for step in counted) / seconds,
        step_ms=1000 * seconds / len(counted),
        counts=tuple(plans[-1]["counts"] if plans else evenly),
        own_ms=tuple(statistics.median(rank) for rank in zip(*own, strict=True)),
        last_loss=steps[-1]["loss"],
    )
