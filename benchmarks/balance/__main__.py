"""Static against balanced, one rank at about half speed: ``python -m benchmarks.balance``.

The trainer itself (``python -m ltf train``), two ranks, each held to one core. A process that only computes
is held to the second rank's core, so that the rank gets about half of it. Runs with ``balance.mode`` static
and auto take turns; both take the same global batches. What counts are the steps after the first plan, by
the run's own events. ``--competitors 0`` leaves the second rank alone: the control, in which balance must
cost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.balance.run import Run, RunFailed, Setup, run
from ltf.data.corpus import text
from ltf.data.prepare import Recipe, prepare

MODES = ("static", "auto")


@dataclass(frozen=True)
class Row:
    """Medians over rounds; the counts are the last round's."""

    mode: str
    tokens_per_second: float
    step_ms: float
    counts: tuple[int, ...]
    own_ms: tuple[float, ...]


def rows(runs: Sequence[Run]) -> list[Row]:
    return [_row(mode, [each for each in runs if each.mode == mode]) for mode in MODES]


def ratio(runs: Sequence[Run]) -> float:
    """Balanced over static throughput: the median over rounds, whose two runs stand side by side."""
    pairs = zip(runs[::2], runs[1::2], strict=True)
    return statistics.median(auto.tokens_per_second / static.tokens_per_second for static, auto in pairs)


def _row(mode: str, runs: Sequence[Run]) -> Row:
    return Row(
        mode,
        statistics.median(each.tokens_per_second for each in runs),
        statistics.median(each.step_ms for each in runs),
        runs[-1].counts,
        tuple(statistics.median(rank) for rank in zip(*(each.own_ms for each in runs), strict=True)),
    )


def _corpus(folder: Path) -> Path:
    documents = folder / "grammar.jsonl"
    documents.write_text("".join(json.dumps({"text": each}) + "\n" for each in text(seed=1, size=1_000_000)))
    prepare([documents], folder / "grammar", Recipe())
    return folder / "grammar"


def _print(table: Sequence[Row], gain: float, rounds: int) -> None:
    print("| split | tokens/s | step ms | micro-batches by rank | own ms a micro-batch, forward, by rank |")
    print("| --- | --- | --- | --- | --- |")
    for row in table:
        own = " / ".join(f"{each:.1f}" for each in row.own_ms)
        counts = " / ".join(map(str, row.counts))
        print(f"| {row.mode} | {row.tokens_per_second:.0f} | {row.step_ms:.0f} | {counts} | {own} |")
    print(f"\nbalanced / static throughput: {gain:.2f} (median of {rounds} rounds)")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of a static and a balanced run")
    parser.add_argument("--learn", type=int, default=5, help="steps whose speed a plan follows")
    parser.add_argument("--steps", type=int, default=20, help="steps after the first plan")
    parser.add_argument("--samples", type=int, default=24, help="of the global batch")
    parser.add_argument("--micro", type=int, default=1, help="samples of a micro-batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens in a sample")
    parser.add_argument("--competitors", type=int, default=1, help="processes on the second rank's core")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("error: two cores are needed, one a rank", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = Setup(
            cores=tuple(cores),
            learn=options.learn,
            steps=options.steps,
            samples=options.samples,
            micro=options.micro,
            sequence=options.sequence,
            corpus=_corpus(folder),
            folder=folder,
        )
        try:
            runs = [run(setup, mode, options.competitors) for _ in range(options.rounds) for mode in MODES]
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    table, gain = rows(runs), ratio(runs)
    if options.json:
        document = {
            "schema": "ltf/benchmark-balance/2",
            "ratio": gain,
            "rows": [asdict(row) for row in table],
            "runs": [asdict(each) for each in runs],
        }
        print(json.dumps(document))
    else:
        _print(table, gain, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
