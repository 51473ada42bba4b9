"""Work that one rank may fail at by itself, done so that all ranks learn of it and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ltf.parallel.world import World

T = TypeVar("T")


class OthersFailed(Exception):
    """Other ranks could not do what this one could; what was wrong stands in their output."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"rank {', '.join(map(str, ranks))} could not go on; see its output")
        self.ranks = ranks


def together(world: World, work: Callable[[], T], *, first_alone: bool = False) -> T:
    """What `work` gives, if it worked on every rank; this rank's own exception, or else OthersFailed.

    `first_alone`: rank 0 does it before the others begin, as where it writes what they read.
    """
    if not first_alone:
        return _agreed(world, work)
    result: list[T] = []
    _agreed(world, lambda: result.append(work()) if world.rank == 0 else None)
    return _agreed(world, lambda: result[0] if result else work())


def _agreed(world: World, work: Callable[[], T]) -> T:
    error: Exception | None = None
    try:
        done = work()
    except Exception as caught:  # noqa: BLE001 - raised again, after the others have heard of it
        error = caught
    failed = [rank for rank, (flag,) in enumerate(world.gather([float(error is not None)])) if flag]
    if error is not None:
        raise error
    if failed:
        raise OthersFailed(failed)
    return done
