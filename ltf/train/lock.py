"""One run in a folder at a time: two would delete each other's checkpoints and mix their events.

Rank 0, the only process that renames and deletes checkpoints, holds ``RUNNING`` in each folder of the run by
flock(2) as long as it lives. The kernel lets go of it when the process ends, however it ends, so nothing has
to be cleaned up after a SIGKILL. Between nodes the lock is seen where the filesystem carries it: NFS, CephFS,
GPFS, and Lustre mounted with ``flock``. Where it does not (Lustre with ``localflock``), only processes of one
node are kept apart. Where there are no locks at all, `Lock.unlocked` says why and the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ltf.findings import Finding, Severity

NAME = "RUNNING"
# A process that was just killed may be a moment in dying, and its successor starts at once.
PATIENCE_SECONDS = 5.0
POLL_SECONDS = 0.1
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.EINVAL)
# These do not pass by themselves; a full disk may.
NOT_A_PLACE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
)


class OutputError(Exception):
    """A folder of the run cannot be written. One line with what to do."""


class Taken(Exception):
    """Another run has the folder. One line that names it."""


class Lock:
    """Holds the folders from its making to `close`. Taken if another process keeps one of them.

    `run`: what the holder is called in the other's message.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        run: str,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.unlocked: dict[Path, str] = {}
        self._files: list[int] = []
        self._clock, self._pause = clock, pause
        deadline = clock() + patience_seconds
        try:
            # A folder named twice would be refused by our own lock.
            for folder in dict.fromkeys(folder.resolve() for folder in folders):
                self._take(folder, run, deadline)
        except BaseException:
            self.close()
            raise

    @property
    def findings(self) -> list[Finding]:
        """What people should know of folders that could not be locked."""
        return [
            Finding(
                "run.unlocked",
                Severity.WARNING,
                0,
                f"{folder} is not locked ({why}): nothing stops a second run in it",
                evidence={"folder": str(folder), "wrong": why},
            )
            for folder, why in self.unlocked.items()
        ]

    def close(self) -> None:
        """Let go. The file stays: to delete it would let two others hold two files of one name."""
        for file in self._files:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
            os.close(file)
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, folder: Path, run: str, deadline: float) -> None:
        try:
            file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            # What cannot be written cannot be destroyed by a second run either.
            self.unlocked[folder] = error.strerror or str(error)
            return
        self._files.append(file)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if self._clock() >= deadline:
                    raise Taken(_taken(folder, file)) from None
                self._pause(POLL_SECONDS)
            except OSError as error:
                if error.errno not in NO_LOCKS_HERE:
                    raise
                self.unlocked[folder] = error.strerror or str(error)
                return
        about = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time())}
        # For people only, so a full disk may keep it away.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(about).encode() + b"\n", 0)


def make(folders: Sequence[Path]) -> None:
    """Make a run's folders where they are missing; OutputError where no such folder can be written.

    A full disk is no error here: training goes on without one, and the checkpoints say that they fail.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, "it cannot be written")
        except OSError as error:
            if error.errno in NOT_A_PLACE:
                raise OutputError(
                    f"run.output or checkpoint.directory: {folder} cannot be used: {_why(error, folder)}; "
                    "give a folder that can be written, with --set run.output=FOLDER"
                ) from None


def _why(error: OSError, folder: Path) -> str:
    for place in (folder, *folder.parents):
        if place.exists():
            return error.strerror or str(error) if place.is_dir() else f"{place} is a file"
    return error.strerror or str(error)


def _taken(folder: Path, file: int) -> str:
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(os.pread(file, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        who = f"process {about['pid']} on {about['host']} (run {about['run']!r}, since {since})"
    return (
        f"{folder} is in use by {who}; wait until it ends or end it, or give this run another folder with "
        "--set run.output=FOLDER"
    )
