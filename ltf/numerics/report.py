"""The outcome of all trials, as a table for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ltf.numerics.candidates import Candidate, Unavailable
from ltf.numerics.compare import Difference, Quantity, Row, Stage
from ltf.numerics.trial import Trial

SCHEMA = "ltf/numerics/1"
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Report:
    """`own`: the configured combination. `model`: what was compared. `timed`: what speed is of."""

    device: str
    reference: str
    model: str
    timed: str
    steps: int
    own: Candidate
    trials: Sequence[Trial]
    unavailable: Sequence[Unavailable]

    @property
    def passed(self) -> bool:
        """Whether what the configuration asks for passes."""
        return any(trial.passed for trial in self.trials if trial.candidate == self.own)

    @property
    def fastest(self) -> Trial | None:
        """Of those that pass and were timed."""
        timed = [trial for trial in self.trials if trial.passed and trial.milliseconds is not None]
        return min(timed, key=lambda trial: trial.milliseconds or math.inf, default=None)


def text(report: Report, *, details: bool = False) -> str:
    """Aligned tables. `details`: every comparison of the configured combination, not the worst alone."""
    lines = [
        f"device     {report.device}",
        f"reference  {report.reference}",
        f"model      {report.model}",
        f"speed of   {report.timed}",
        "",
        *_aligned([_HEAD, *(_summary(trial, trial.candidate == report.own) for trial in report.trials)]),
    ]
    for missing in report.unavailable:
        lines.append(f"not on this device: {missing.name}: {missing.why}")
    for trial in report.trials:
        if trial.candidate == report.own or not trial.passed:
            lines += ["", *_explained(trial, details=details and trial.candidate == report.own)]
    fastest = report.fastest
    if fastest is not None:
        lines += ["", f"fastest that passes: {fastest.candidate.name}", fastest.candidate.settings()]
    verdict = "passes" if report.passed else "DOES NOT PASS"
    lines += ["", f"the configured combination, {report.own.name}, {verdict}"]
    return "\n".join(lines)


def json_of(report: Report) -> dict[str, object]:
    """The documented form; numbers that JSON has not (NaN, infinity) are null."""
    fastest = report.fastest
    return {
        "schema": SCHEMA,
        "device": report.device,
        "reference": report.reference,
        "model": report.model,
        "timed": report.timed,
        "steps": report.steps,
        "configured": report.own.name,
        "passed": report.passed,
        "fastest": None if fastest is None else fastest.candidate.name,
        "unavailable": [{"name": missing.name, "why": missing.why} for missing in report.unavailable],
        "candidates": [_trial(trial) for trial in report.trials],
    }


_HEAD = ("", "candidate", "ms", "result", "cosine", "error", "gain", "flips 1st/last step", "diverges first")


def _summary(trial: Trial, own: bool) -> tuple[str, ...]:
    mark = "*" if own else ""
    milliseconds = "-" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
    if trial.error is not None:
        return (mark, trial.candidate.name, milliseconds, "error", "-", "-", "-", "-", trial.error)
    worst = _worst(row for row in trial.rows if row.stage is Stage.ISOLATED)
    first = trial.first
    flips = "/".join(
        "-" if share is None else f"{share:.2%}" for share in (trial.flips.accumulated, trial.flips.steps)
    )
    result = "pass" if trial.passed else "FAIL"
    named = "-" if first is None else first.operator
    return (mark, trial.candidate.name, milliseconds, result, *_numbers(worst), flips, named)


def _explained(trial: Trial, *, details: bool) -> list[str]:
    """The worst of each stage and quantity, then what failed."""
    title = f"{trial.candidate.name}: {'pass' if trial.passed else 'FAIL'}"
    if trial.error is not None:
        return [title, f"  {trial.error}"]
    head = ("stage", "quantity", "operators", "cosine", "error", "gain", "failed")
    table: list[tuple[str, ...]] = [head]
    for stage in Stage:
        for quantity in Quantity:
            rows = [row for row in trial.rows if row.stage is stage and row.quantity is quantity]
            if rows:
                failed = sum(not row.passed for row in rows)
                count = len({row.operator for row in rows})
                table.append((stage, quantity, str(count), *_numbers(_worst(rows)), str(failed)))
    lines = [title, *(f"  {line}" for line in _aligned(table))]
    first = trial.first
    if first is not None:
        how = {
            Stage.ISOLATED: "given the reference's inputs",
            Stage.ACCUMULATED: "behind the others; no operator fails by itself",
            Stage.STEPS: "over the optimizer's steps only; its first step is right",
        }[first.stage]
        lines.append(f"  diverges first: {first.operator} ({first.quantity}, {how})")
    shown = trial.rows if details else [row for row in trial.rows if not row.passed][:20]
    if shown:
        head = ("stage", "operator", "quantity", "cosine", "error", "gain", "")
        lines += [f"  {line}" for line in _aligned([head, *map(_line, shown)])]
    return lines


def _line(row: Row) -> tuple[str, ...]:
    result = "" if row.passed else "FAIL"
    return (row.stage, row.operator, row.quantity, *_numbers(row.difference), result)


def _worst(rows: Iterable[Row]) -> Difference:
    """The lowest cosine, the largest error and the largest gain, each for itself."""
    found = [row.difference for row in rows]
    if any(math.isnan(one.cosine) for one in found):
        return Difference(math.nan, math.inf, math.nan)
    return Difference(
        min(one.cosine for one in found),
        max(one.error for one in found),
        max((one.gain for one in found), key=abs),
    )


def _numbers(found: Difference) -> tuple[str, str, str]:
    return (f"{found.cosine:.6f}", f"{found.error:.1e}", f"{found.gain:+.1e}")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _trial(trial: Trial) -> dict[str, object]:
    first = trial.first
    candidate = trial.candidate
    return {
        "name": candidate.name,
        "dtype": candidate.dtype,
        "attention_kernel": candidate.attention,
        "experts_kernel": candidate.experts,
        "compile": candidate.compiled,
        "passed": trial.passed,
        "error": trial.error,
        "milliseconds": trial.milliseconds,
        "losses": [_finite(loss) for loss in trial.losses],
        "reference_losses": trial.reference_losses,
        "flips": {
            "isolated": trial.flips.isolated,
            "accumulated": trial.flips.accumulated,
            "steps": trial.flips.steps,
        },
        "first": None if first is None else _row(first),
        "comparisons": [_row(row) for row in trial.rows],
    }


def _row(row: Row) -> dict[str, Cell]:
    return {
        "stage": row.stage,
        "operator": row.operator,
        "quantity": row.quantity,
        "cosine": _finite(row.difference.cosine),
        "error": _finite(row.difference.error),
        "gain": _finite(row.difference.gain),
        "least_cosine": row.limits.cosine,
        "most_error": _finite(row.limits.error),
        "most_gain": row.limits.gain,
        "passed": row.passed,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
