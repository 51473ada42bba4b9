"""Static against balanced, one rank at about half speed: ``python -m benchmarks.balance``.

Two ranks, each held to one core. A process that only computes is held to the second rank's core, so that
the rank gets about half of it. Static and balanced steps take turns in one run; both take the same global
batches.
The balanced steps' plan comes from what the ranks measured of themselves in the first steps and in those
since. ``--competitors 0`` leaves the second rank alone: the control, in which balance must cost nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.balance.busy import compute
from benchmarks.balance.rank import Block, Setup, main


@dataclass(frozen=True)
class Row:
    mode: str
    tokens_per_second: float
    step_ms: float
    counts: tuple[int, ...]
    own_ms: tuple[float, ...]


def rows(blocks: Sequence[Block], setup: Setup) -> list[Row]:
    """Medians over rounds; the counts are the last round's."""
    made = []
    for mode in ("static", "auto"):
        of_mode = [block for block in blocks if block.mode == mode]
        seconds = statistics.median(block.seconds for block in of_mode) / setup.block
        own = tuple(statistics.median(rank) for rank in zip(*(b.own_ms for b in of_mode), strict=True))
        made.append(
            Row(mode, setup.samples * setup.sequence / seconds, 1000 * seconds, of_mode[-1].counts, own)
        )
    return made


def ratio(blocks: Sequence[Block]) -> float:
    """Balanced over static throughput: the median over rounds, whose two blocks stand side by side."""
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return statistics.median(static.seconds / auto.seconds for static, auto in pairs)


def run(setup: Setup, competitors: int) -> list[Block]:
    context = multiprocessing.get_context("spawn")
    with (
        _busy(setup.cores[-1], competitors),
        ProcessPoolExecutor(len(setup.cores), mp_context=context) as pool,
    ):
        results = [pool.submit(main, rank, setup) for rank in range(len(setup.cores))]
        of_first, *_ = [result.result(timeout=900) for result in results]
        return of_first


@contextmanager
def _busy(core: int, number: int) -> Iterator[None]:
    # Forked: a spawned process would import what this one did, and be late.
    context = multiprocessing.get_context("fork")
    begun = [context.Event() for _ in range(number)]
    processes = [context.Process(target=compute, args=(core, event), daemon=True) for event in begun]
    for process in processes:
        process.start()
    for event in begun:
        event.wait(timeout=60)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="static and balanced blocks, in turns")
    parser.add_argument("--block", type=int, default=6, help="steps in a block")
    parser.add_argument("--learn", type=int, default=6, help="steps whose speed a plan follows")
    parser.add_argument("--samples", type=int, default=24, help="of the global batch")
    parser.add_argument("--micro", type=int, default=1, help="samples of a micro-batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens in a sample")
    parser.add_argument(
        "--competitors", type=int, default=1, help="competing processes on the second rank's core"
    )
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("error: two cores are needed, one a rank", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            cores=tuple(cores),
            rounds=options.rounds,
            block=options.block,
            learn=options.learn,
            samples=options.samples,
            micro=options.micro,
            sequence=options.sequence,
            rendezvous=f"file://{Path(folder) / 'store'}",
        )
        blocks = run(setup, options.competitors)
    table, gain = rows(blocks, setup), ratio(blocks)
    if options.json:
        print(
            json.dumps(
                {
                    "schema": "ltf/benchmark-balance/1",
                    "ratio": gain,
                    "rows": [asdict(row) for row in table],
                    "blocks": [asdict(block) for block in blocks],
                }
            )
        )
        return 0
    print("| split | tokens/s | step ms | micro-batches by rank | own ms a micro-batch, forward, by rank |")
    print("| --- | --- | --- | --- | --- |")
    for row in table:
        own = " / ".join(f"{each:.1f}" for each in row.own_ms)
        counts = " / ".join(map(str, row.counts))
        print(f"| {row.mode} | {row.tokens_per_second:.0f} | {row.step_ms:.0f} | {counts} | {own} |")
    print(f"\nbalanced / static throughput: {gain:.2f} (median of {options.rounds} rounds)")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
