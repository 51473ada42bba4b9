"""What a job's attempts so far say: progress, repetition, suspicion. Pure readings of the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from recovery.blame import Blame
from recovery.supervise.model import (
    Attempt,
    Fault,
)


def root(attempt: Attempt) -> Fault | None:
    """What ended it; None where nothing is known."""
    return next((fault for fault in attempt.faults if fault.ends), None)


def stepped(attempts: Sequence[Attempt], silent_seconds: float) -> bool:
    """Whether any of them got as far as training."""
    return any(new_steps(attempts, silent_seconds))


def new_steps(attempts: Sequence[Attempt], silent_seconds: float) -> list[bool]:
    """By attempt: did it do a step that none before it had done?

    One whose trainer tells no steps counts as having done some when it ran for `silent_seconds`.
    """
    return _advanced(attempts, [each.last_step for each in attempts], silent_seconds)


def new_checkpoints(attempts: Sequence[Attempt], silent_seconds: float) -> list[bool]:
    """By attempt: did it save a later step than any before it? Silent trainers as in `new_steps`."""
    return _advanced(attempts, [each.durable_step for each in attempts], silent_seconds)


def trailing(flags: Sequence[bool]) -> int:
    """How many at the end are false."""
    count = 0
    for flag in reversed(flags):
        if flag:
            break
        count += 1
    return count


def repetitions(attempts: Sequence[Attempt], silent_seconds: float) -> int:
    """How many earlier attempts ended by the last one's root fault, at the same place.

    Those before the newest progress that survived (a later checkpoint) do not count: what comes back after
    the job got on for good is another event.
    """
    last = root(attempts[-1])
    saved = new_checkpoints(attempts, silent_seconds)
    count = 0
    if last is None:
        return 0
    for at in range(len(attempts) - 1, 0, -1):
        if saved[at]:
            break
        earlier = root(attempts[at - 1])
        count += earlier is not None and _same(earlier, last)
    return count


def suspicions(attempts: Sequence[Attempt]) -> Counter[str]:
    """By node: in how many attempts it was suspected by a fault that proved nothing."""
    counts: Counter[str] = Counter()
    for attempt in attempts:
        counts.update({node for fault in attempt.faults if not fault.convicted for node in fault.suspects})
    return counts


def checkpoint_failures(attempts: Sequence[Attempt], silent_seconds: float) -> Counter[int]:
    """By step of a checkpoint: how many attempts that went on from it ended without a new step, where nothing
    else explains it (a proven node, the platform)."""
    counts: Counter[int] = Counter()
    for attempt, advanced in zip(attempts, new_steps(attempts, silent_seconds), strict=True):
        if attempt.resumed_from is not None and not advanced and not _explained(attempt):
            counts[attempt.resumed_from] += 1
    return counts


def told(attempts: Sequence[Attempt], since: int) -> tuple[str, ...]:
    """A line for each attempt from index `since` on: where it started, how far it got, what ended it."""
    lines = []
    for at in range(max(since, 0), len(attempts)):
        attempt, fault = attempts[at], root(attempts[at])
        start = "the beginning" if attempt.resumed_from is None else f"step {attempt.resumed_from}"
        before = set(attempts[at - 1].nodes) if at else set(attempt.nodes)
        came, went = sorted(set(attempt.nodes) - before), sorted(before - set(attempt.nodes))
        swap = f" with {', '.join(went)} replaced by {', '.join(came)}" if came or went else ""
        reached = "no step" if attempt.last_step is None else f"step {attempt.last_step}"
        ended = "nothing known" if fault is None else f"{fault.kind}: {fault.message}"
        lines.append(f"attempt {attempt.number} from {start}{swap}: reached {reached}; {ended}")
    return tuple(lines)


def _advanced(
    attempts: Sequence[Attempt], reached: Sequence[int | None], silent_seconds: float
) -> list[bool]:
    best: int | None = None
    flags = []
    for attempt, step in zip(attempts, reached, strict=True):
        if attempt.tells_steps or step is not None:
            flags.append(step is not None and (best is None or step > best))
        else:
            ran = 0.0 if attempt.ended is None else attempt.ended - attempt.started
            flags.append(ran >= silent_seconds)
        if step is not None:
            best = step if best is None else max(best, step)
    return flags


def _same(one: Fault, other: Fault) -> bool:
    """Without a known place, the same kind at the same step is the same."""
    if one.kind != other.kind or one.place != other.place:
        return False
    return one.place is not None or one.step == other.step


def _explained(attempt: Attempt) -> bool:
    fault = root(attempt)
    if fault is None or fault.kind.startswith("checkpoint."):
        return False
    return bool(fault.convicted) or fault.blame is Blame.PLATFORM
