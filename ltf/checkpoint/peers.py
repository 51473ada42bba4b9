"""The ranks as their saver threads see each other, apart from every group that training uses.

A gloo group of their own, because a collective of a side thread on a group of the main thread would meet the
wrong partner, and a key-value store with a connection of its own, because one that waits blocks its users.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store  # torch.distributed has them, untyped
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What went wrong on one rank. `errno`: an operating system's. `free`: bytes left where it was."""

    rank: int
    text: str
    errno: int | None = None
    path: str | None = None
    free: int | None = None


class Failed(Exception):
    """Raised on all ranks alike when some step failed on at least one of them."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"rank {problem.rank}: {problem.text}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class Peers:
    """`group`: None for a single process that has not joined torch.distributed."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    store: Store

    @classmethod
    def join(cls, timeout_seconds: float) -> Peers:
        """All ranks call it, from the main thread. `timeout_seconds`: of a rank's silence inside a save."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, None, HashStore())
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        # A store outlives an attempt under some launchers: keys of an earlier one must not be seen.
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0, group=group)
        store = PrefixStore(f"ltf/checkpoint/{name[0]}", _get_default_store())
        return cls(dist.get_rank(), dist.get_world_size(), group, store)

    def leave(self) -> None:
        """Free the group; all ranks call it."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, work: Callable[[], T], where: Path | None = None) -> list[T]:
        """Do it and gather the results; `Failed` on all ranks if it raised on one. `where`: the disk used."""
        result: T | Problem
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # noqa: BLE001  (told to all ranks, then raised)
            result = problem(self.rank, error, where)
        results = self.gather(result)
        if problems := [found for found in results if isinstance(found, Problem)]:
            raise Failed(problems)
        return results  # type: ignore[return-value]


def problem(rank: int, error: BaseException, where: Path | None) -> Problem:
    if not isinstance(error, OSError):
        return Problem(rank, f"{type(error).__name__}: {error}", path=None if where is None else str(where))
    path = str(error.filename or where)
    free = _free(where)
    left = "" if free is None else f" ({free} bytes free)"
    return Problem(rank, f"{error.strerror or error}: {path}{left}", error.errno, path, free)


def _free(where: Path | None) -> int | None:
    for folder in () if where is None else (where, *where.parents):
        if folder.exists():
            found = os.statvfs(folder)
            return found.f_bavail * found.f_frsize
    return None
