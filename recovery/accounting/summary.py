"""An account in a few lines of text, as plain data: whoever prints decides on columns and colours."""

from __future__ import annotations

from dataclasses import dataclass

from recovery.accounting.account import NS, Account, Bucket
from recovery.accounting.reliability import Reliability, reliability

TITLES = {
    Bucket.PRODUCTIVE: "productive",
    Bucket.REDONE: "redone",
    Bucket.STARTING: "starting",
    Bucket.VALIDATING: "validating",
    Bucket.DETECTING: "detecting",
    Bucket.DIAGNOSING: "diagnosing",
    Bucket.WAITING: "waiting for nodes",
    Bucket.RESTARTING: "restarting",
    Bucket.CHECKPOINT: "checkpoint stall",
    Bucket.STOPPED: "stopped",
}
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, a time, its share of the wall-clock (0 to 1), and a bar for it."""

    name: str
    seconds: float
    share: float
    bar: str
    note: str = ""


@dataclass(frozen=True)
class Summary:
    head: tuple[str, ...]
    """Sentences, the most important first."""
    buckets: tuple[Row, ...]
    """Those with time in them, in the order of :class:`Bucket`."""
    lost: tuple[Row, ...]
    """By cause, largest first; shares are of the wall-clock."""
    advice: tuple[str, ...]
    """About failures to come, or why nothing can be said yet."""

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it as text."""
        return (
            *self.head,
            *_table("time", self.buckets),
            *_table("lost to", self.lost),
            *self.advice,
        )


def summary(account: Account, *, width: int = 30) -> Summary:
    """The lines for `account`; bars are at most `width` characters wide, their unit is the whole
    wall-clock."""
    wall = account.wall
    buckets = tuple(
        _row(TITLES[bucket], ns, wall, width, _bucket_note(account, bucket))
        for bucket, ns in account.buckets.items()
        if ns
    )
    lost = tuple(
        _row(
            one.cause,
            one.total,
            wall,
            width,
            "" if one.planned else f"{one.faults} fault{'s' if one.faults != 1 else ''}, {one.blame}",
        )
        for one in account.lost
    )
    return Summary(tuple(_head(account)), buckets, lost, tuple(_advice(reliability(account))))


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.0 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 1:
        return f"{seconds:.2g} s" if seconds else "0 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((60, 1, "min", "s"), (3600, 60, "h", "min"), (86_400, 3600, "d", "h")):
        if whole < large * (24 if unit == "h" else 60 if unit == "min" else 10**9):
            return f"{whole // large} {unit} {whole % large // small} {part}"
    raise AssertionError(seconds)


def percent(share: float | None) -> str:
    """``93.4 %``; ``-`` where it is not known. Never 100 % for less than all."""
    if share is None:
        return "-"
    return f"{min(share * 100, 99.9) if share < 1 else 100:.1f} %"


def _head(account: Account) -> list[str]:
    state = TITLES[account.phase] if account.outcome is None else account.outcome.value
    if account.outcome is None and account.phase is Bucket.PRODUCTIVE:
        state = "training"
    lines = [
        f"{state}: step {account.last_step}, {_count(len(account.attempts), 'attempt')},"
        f" {_count(len(account.faults), 'fault')}, {duration(account.wall / NS)}"
    ]
    ettr = f"ETTR {percent(account.ettr)}"
    if account.wall > 3600 * NS:
        ettr += f", last hour {percent(account.ettr_last_hour)}"
    lines.append(f"{ettr}; lost {duration(account.lost_total / NS)}")
    if account.attempts and not account.steps_done:
        lines.append("no step was told: a trainer that writes no events has no productive time here")
    if account.goodput is not None and account.throughput is not None:
        lines.append(
            f"{account.goodput:,.0f} tokens/s of lasting progress, {account.throughput:,.0f} while training"
        )
    if account.outcome is None and account.at_risk:
        lines.append(
            f"{duration(account.at_risk / NS)} of work since the last saved checkpoint"
            f" (step {account.saved_step})"
        )
    if account.unsupervised:
        lines.append(f"{duration(account.unsupervised / NS)} without a supervisor")
    return lines


def _advice(one: Reliability) -> list[str]:
    lines = []
    if one.mttf is not None:
        most = f"{duration(one.mttf_at_most)}" if one.mttf_at_most else "?"
        lines.append(
            f"time between failures {duration(one.mttf)}"
            f" (90 %: {duration(one.mttf_at_least or 0)} to {most}, from {_count(one.failures, 'failure')})"
        )
    elif one.mttf_at_least:
        lines.append(f"no failure yet: time between failures above {duration(one.mttf_at_least)} (95 %)")
    if one.failures_per_node_day:
        lines.append(f"{float(f'{1000 * one.failures_per_node_day:.3g}'):,g} failures per 1,000 node-days")
    if one.mttr is not None:
        lines.append(f"back after {duration(one.mttr)} on average")
    if one.expected_ettr is not None and not one.missing:
        lines.append(f"expected ETTR at this rate {percent(one.expected_ettr)}")
    if one.advice and one.save_interval is not None and one.save_cost is not None:
        lines.append(
            f"saves every {duration(one.save_interval)} of training at {duration(one.save_cost)} each"
            f" lose {percent(one.loss_now)}"
        )
        for advice in one.advice:
            steps = f", {_count(advice.steps, 'step')}" if advice.steps else ""
            lines.append(
                f"  {advice.formula}: every {duration(advice.seconds)}{steps}, loses {percent(advice.loss)}"
            )
    elif one.missing:
        lines.append(f"no advice on the save interval: {'; '.join(one.missing)}")
    return lines


def _bucket_note(account: Account, bucket: Bucket) -> str:
    if bucket is Bucket.CHECKPOINT and account.saves:
        return _count(account.saves, "save")
    if bucket is Bucket.REDONE and (gone := account.steps_done - account.steps_surviving):
        return _count(gone, "step")
    if bucket is Bucket.PRODUCTIVE:
        return _count(account.steps_surviving, "step")
    return ""


def _row(name: str, ns: int, wall: int, width: int, note: str) -> Row:
    share = ns / wall if wall else 0.0
    return Row(name, ns / NS, share, _bar(share, width), note)


def _bar(share: float, width: int) -> str:
    """At least a sliver for what is not nothing."""
    eighths = max(1, round(share * width * 8)) if share > 0 else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _table(title: str, rows: tuple[Row, ...]) -> list[str]:
    if not rows:
        return []
    names = max(len(row.name) for row in rows)
    lines = [title]
    for row in rows:
        note = f"  {row.note}" if row.note else ""
        figures = f"{duration(row.seconds):>12}  {percent(row.share):>7}"
        lines.append(f"  {row.name:<{names}}  {figures}  {row.bar}{note}".rstrip())
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
