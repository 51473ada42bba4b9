"""How long training stands still for a save, side by side in one run: ``python -m benchmarks.checkpoint``.

One process, one dense decoder with AdamW. A round takes every method in turn: save, one training step, wait
until the save is durable. Standing still is what the training thread spends in calls of the saver, before and
behind the step's passes; slower is what the step itself takes more than one without a save beside it. Ours
also computes digests, and commits; the others are as their documentation shows them, `torch.save` followed by
fsync so that all are durable.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ltf.checkpoint.saver import Saved, Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Checkpoint
from ltf.model.args import ModelArgs
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights


@dataclass(frozen=True)
class Row:
    """Seconds, medians over rounds."""

    method: str
    stands_still: float
    step_slower: float
    durable_after: float


@dataclass(frozen=True)
class Sample:
    stands_still: float
    step: float
    durable_after: float


class Training:
    def __init__(self, width: int, layers: int) -> None:
        args = ModelArgs(
            vocab_size=8192,
            layers=layers,
            width=width,
            heads=8,
            kv_heads=8,
            head_dim=width // 8,
            ffn_width=3 * width,
        )
        self.model = Decoder(args)
        init_weights(self.model, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(0, args.vocab_size, (1, 128))
        self.passes()
        self.update()

    @property
    def state_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) * 3

    def passes(self) -> None:
        logits = self.model(self.tokens).out
        nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten()).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }


Method = Callable[[Training, Path], Sample]


def idle(training: Training, _: Path) -> Sample:
    start = time.perf_counter()
    training.passes()
    training.update()
    return Sample(0.0, time.perf_counter() - start, 0.0)


class Ours:
    """One saver for all rounds, so that its memory is there, as in a run, from the second on."""

    def __init__(self, training: Training, folder: Path, *, background: bool) -> None:
        state = State([training.model], [training.optimizer])
        settings = Checkpoint(background=background)
        self.background = background
        self.saver = Saver(Store(folder), state, settings, config={}, signals=False)
        self.version = 0
        self.saver.finished_update(0, {})

    def __call__(self, training: Training, _: Path) -> Sample:
        self._moved_on()
        start = time.perf_counter()
        still = self.saver.request()
        durable = time.perf_counter() - start
        begin = time.perf_counter()
        training.passes()
        step = time.perf_counter() - begin
        still += self.saver.before_update()
        begin = time.perf_counter()
        training.update()
        step += time.perf_counter() - begin
        self.version += 1
        self.saver.finished_update(self.version, {})
        self.saver.wait()
        if self.background:
            durable = time.perf_counter() - start
        if not any(isinstance(found, Saved) for found in self.saver.poll()):
            raise RuntimeError("a save failed")
        return Sample(still, step, durable)

    def _moved_on(self) -> None:
        self.saver.before_update()
        self.version += 1
        self.saver.finished_update(self.version, {})


def torch_save(training: Training, folder: Path) -> Sample:
    def save() -> None:
        with (folder / "state.pt").open("wb") as stream:
            torch.save(training.state_dict(), stream)
            stream.flush()
            os.fsync(stream.fileno())

    return _standing(training, save)


def dcp_save(training: Training, folder: Path) -> Sample:
    return _standing(training, lambda: dcp.save(training.state_dict(), checkpoint_id=folder / "dcp"))


def dcp_async_save(training: Training, folder: Path) -> Sample:
    start = time.perf_counter()
    future = dcp.async_save(training.state_dict(), checkpoint_id=folder / "dcp-async")
    still = time.perf_counter() - start
    step = idle(training, folder).step
    assert isinstance(future, Future)
    future.result()
    return Sample(still, step, time.perf_counter() - start)


def _standing(training: Training, save: Callable[[], object]) -> Sample:
    start = time.perf_counter()
    save()
    still = time.perf_counter() - start
    return Sample(still, idle(training, Path()).step, still)


def measure(training: Training, folder: Path, rounds: int) -> list[Row]:
    background = Ours(training, folder / "background", background=True)
    foreground = Ours(training, folder / "foreground", background=False)
    methods: dict[str, Method] = {
        "ours, in the background": background,
        "ours, background: false": foreground,
        "torch.save and fsync": torch_save,
        "torch.distributed.checkpoint.save": dcp_save,
        "torch.distributed.checkpoint.async_save": dcp_async_save,
    }
    samples: dict[str, list[Sample]] = {name: [] for name in methods}
    idle_steps = []
    for turn in range(rounds + 1):
        for name, method in methods.items():
            idle_step = idle(training, folder).step
            for old in ("dcp", "dcp-async"):
                shutil.rmtree(folder / old, ignore_errors=True)
            os.sync()
            sample = method(training, folder)
            if turn:  # The first round takes memory, and starts threads, once and for all.
                idle_steps.append(idle_step)
                samples[name].append(sample)
    background.saver.close()
    foreground.saver.close()
    step = statistics.median(idle_steps)
    rows = [
        Row(
            name,
            statistics.median(s.stands_still for s in found),
            statistics.median(s.step for s in found) - step,
            statistics.median(s.durable_after for s in found),
        )
        for name, found in samples.items()
    ]
    return [Row("a step without a save", 0.0, step, 0.0), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of the training's own operators")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    training = Training(arguments.width, arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        baseline, *rows = measure(training, Path(folder), arguments.rounds)
    dist.destroy_process_group()
    print(f"state: {training.state_bytes / 1e6:.0f} MB; a step without a save: {baseline.step_slower:.3f} s")
    print(f"{'method':<42}{'stands still s':>15}{'step slower s':>15}{'durable after s':>17}")
    for row in rows:
        print(f"{row.method:<42}{row.stands_still:>15.3f}{row.step_slower:>15.3f}{row.durable_after:>17.3f}")
    if arguments.json:
        report = {
            "state_bytes": training.state_bytes,
            "step_seconds": baseline.step_slower,
            "rounds": arguments.rounds,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
