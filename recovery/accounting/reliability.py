"""How often a job fails, what that costs, and how often it should save.

Time between failures is exposure divided by failures: the time in attempts counts whether or not it ended
in a failure, so that a job that hardly fails is not judged by its failures alone.

Sources of the save intervals: J. Young, "A first order approximation to the optimum checkpoint interval",
CACM 17(9), 1974; J. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
FGCS 22(3), 2006 (its equation for the total run time gives the loss at an interval, and its optimum).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from recovery.accounting.account import NS, Account, Bucket

ENOUGH = 3
"""Failures, and saves, below which no advice is given: from two failures the 90 % interval of the time
between them spans a factor of eighteen."""
DAY = 86_400.0


@dataclass(frozen=True)
class IntervalAdvice:
    """Seconds of training between the ends of two saves, by one formula, and the share of time lost at it."""

    formula: str
    seconds: float
    steps: int | None
    loss: float
    """To saves, redone steps and restarts together, 0 to 1."""


@dataclass(frozen=True)
class Reliability:
    """Times in seconds. What cannot be said yet is None, and `missing` says why."""

    failures: int
    uptime: float
    mttf: float | None
    mttf_at_least: float | None
    """Lower and upper end of the 90 % interval, failures taken as independent of each other."""
    mttf_at_most: float | None
    failures_per_node_day: float | None
    mttr: float | None
    """From the last sign of life to the next step, over faults that are over."""
    save_cost: float | None
    """That training stands still for one save, on average."""
    save_interval: float | None
    """Training between two saves, on average."""
    expected_ettr: float | None
    """1 - (mttr + interval/2) / mttf - save_cost / interval, at the present interval: what the job will reach
    if it goes on failing and saving as it did."""
    loss_now: float | None
    """By Daly's run time, at the present interval; to be compared with those of `advice`."""
    advice: tuple[IntervalAdvice, ...]
    missing: tuple[str, ...]


def reliability(account: Account) -> Reliability:
    """What an account says about failures to come."""
    failures = len(account.faults)
    uptime = account.uptime / NS
    mttf = uptime / failures if failures and uptime else None
    fewest, most = _poisson_interval(failures)
    over = [fault for fault in account.faults if fault.resumed is not None]
    down = sum(ns for fault in over for bucket, ns in fault.buckets.items() if bucket is not Bucket.REDONE)
    mttr = down / NS / len(over) if over else None
    training = (account.buckets[Bucket.PRODUCTIVE] + account.buckets[Bucket.REDONE]) / NS
    saves = account.saves
    cost = account.buckets[Bucket.CHECKPOINT] / NS / saves if saves else None
    interval = training / saves if saves and training else None
    node_days = account.node_uptime / NS / DAY if account.node_uptime else None

    missing = []
    if failures < ENOUGH:
        missing.append(
            f"{failures} of {ENOUGH} failures seen: the time between failures is not known well enough"
        )
    if saves < ENOUGH:
        missing.append(f"{saves} of {ENOUGH} checkpoints saved: the cost of a save is not known well enough")
    elif not cost:
        missing.append("saves cost no measured time: save as often as storage allows")
    advice: tuple[IntervalAdvice, ...] = ()
    if mttf and cost and not missing:
        step = training / account.steps_done if account.steps_done else None
        advice = tuple(
            IntervalAdvice(
                formula,
                seconds := best(cost, mttf),
                max(1, round(seconds / step)) if step else None,
                loss(seconds, cost, mttf, mttr or 0.0),
            )
            for formula, best in _FORMULAS.items()
        )
    known = mttf is not None and cost is not None and interval is not None
    return Reliability(
        failures=failures,
        uptime=uptime,
        mttf=mttf,
        mttf_at_least=uptime / most if uptime else None,
        mttf_at_most=uptime / fewest if uptime and fewest else None,
        failures_per_node_day=failures / node_days if node_days else None,
        mttr=mttr,
        save_cost=cost,
        save_interval=interval,
        expected_ettr=_expected_ettr(mttf, mttr, interval, cost),
        loss_now=loss(interval, cost, mttf, mttr or 0.0) if known else None,  # type: ignore[arg-type]
        advice=advice,
        missing=tuple(missing),
    )


def young(save: float, mttf: float) -> float:
    """sqrt(2 w T)."""
    return math.sqrt(2 * save * mttf)


def daly(save: float, mttf: float) -> float:
    """Young's interval with the next two terms, less the save itself; T where a save takes more than 2 T."""
    if save >= 2 * mttf:
        return mttf
    ratio = save / (2 * mttf)
    return math.sqrt(2 * save * mttf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def optimal(save: float, mttf: float) -> float:
    """The interval at which :func:`loss` is least: the root of 1 - x = exp(-(x + w/T)), times T."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - middle > math.exp(-(middle + save / mttf)):
            low = middle
        else:
            high = middle
    return low * mttf


def loss(interval: float, save: float, mttf: float, restart: float) -> float:
    """Share of wall-clock that is no progress, with failures at random at a constant rate (Daly's
    equation)."""
    exponent = (interval + save + restart) / mttf
    if exponent > 700 or interval <= 0:
        return 1.0
    return 1 - interval / (mttf * math.exp(restart / mttf) * math.expm1((interval + save) / mttf))


_FORMULAS: dict[str, Callable[[float, float], float]] = {
    "Young": young,
    "Daly": daly,
    "least loss": optimal,
}


def _expected_ettr(
    mttf: float | None, mttr: float | None, interval: float | None, cost: float | None
) -> float | None:
    if mttf is None or mttr is None or interval is None or cost is None:
        return None
    return max(0.0, 1 - (mttr + interval / 2) / mttf - cost / interval)


def _poisson_interval(count: int) -> tuple[float, float]:
    """Means that `count` events are not too few or too many for: exact, 5 % on either side."""

    def at_most(events: int, mean: float) -> float:
        return sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(events + 1))

    def root(below: Callable[[float], bool]) -> float:
        low, high = 0.0, count + 10.0 * math.sqrt(count + 1)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) else (low, middle)
        return high

    fewest = root(lambda mean: 1 - at_most(count - 1, mean) < 0.05) if count else 0.0
    return fewest, root(lambda mean: at_most(count, mean) > 0.05)
