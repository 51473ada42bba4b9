"""Work that one rank may fail at by itself, done so that all ranks learn of it and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ltf.parallel.world import World
from ltf.train.mistakes import BROKEN, MISTAKES, status_of

T = TypeVar("T")


class Refused(Exception):
    """Some rank met what a person can mend; all ranks end. `status`: with what.

    The text is what this rank should say of it, empty where another one of its node does.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def together(world: World, work: Callable[[], T], *, first_alone: bool = False) -> T:
    """What `work` gives, if it worked on every rank; else Refused, or this rank's own exception if that is
    not one of MISTAKES.

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
    mine = 0 if error is None else status_of(error)
    statuses = [int(status) for (status,) in world.gather([float(mine)])]
    failed = [rank for rank, status in enumerate(statuses) if status]
    if not failed:
        return done
    if error is not None and not isinstance(error, MISTAKES):
        raise error
    # A defect may be worth another attempt where a mistake is not.
    raise Refused(_text(world, error, failed), BROKEN if BROKEN in statuses else max(statuses)) from error


def _text(world: World, error: Exception | None, failed: list[int]) -> str:
    """What this rank says when those ranks failed."""
    node = world.roster[world.rank].node
    mates = [member.rank for member in world.roster if member.node == node]
    if failed_here := [rank for rank in failed if rank in mates]:
        if world.rank != failed_here[0]:
            return ""
        return str(error) if len(failed) == world.size else f"rank {world.rank}: {error}"
    named = ", ".join(map(str, failed[:8])) + (f" and {len(failed) - 8} more" if len(failed) > 8 else "")
    return f"rank {named} could not go on; see its output" if world.rank == mates[0] else ""
