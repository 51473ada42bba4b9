"""What the host does beside training, made to happen on all ranks at once or not at all."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ltf.findings import Finding, Severity

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class SteadyCollection:
    """Python's garbage is collected at multiples of `every_steps` and never between, while the context lasts.

    Left to itself each rank collects at moments of its own, and every collective waits for the one that just
    does. What was made before (modules, the model) is set aside and no longer looked at, which makes a
    collection short. Leaving the context gives Python back what it had. With None nothing is changed.
    """

    def __init__(self, every_steps: int | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._every, self._clock = every_steps, clock
        self._was_enabled = False

    def __enter__(self) -> Self:
        if self._every is not None:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()
            gc.freeze()
        return self

    def after(self, step: int) -> float | None:
        """Call it after every step; the seconds that a collection took, None when it was not due."""
        if self._every is None or step % self._every:
            return None
        began = self._clock()
        gc.collect()
        return self._clock() - began

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._every is not None:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()


def drop_page_cache(path: Path = DROP_CACHES, sync: Callable[[], None] = os.sync) -> Finding:
    """Ask the kernel to forget the files it holds in memory; once a node, before the run.

    Memory that is full of cached files is reclaimed page by page when training allocates, on each node at
    another moment. "1" drops the page cache alone: with "3" the kernel would also forget directory entries
    and inodes, which hold little and which every start of a process has to read again. Dirty pages stay, so
    they are written out first. It is a favour: a refusal (no root, a container's read-only /proc) is told
    and nothing more. https://docs.kernel.org/admin-guide/sysctl/vm.html#drop-caches
    """
    try:
        # Not O_CREAT: where the kernel has no such file there is nothing to ask.
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            sync()
            os.write(file, b"1\n")
        finally:
            os.close(file)
    except OSError as error:
        return Finding(
            kind="noise.page_cache_refused",
            severity=Severity.INFO,
            step=0,
            message=f"the page cache was not dropped: {path}: {error.strerror}; "
            "run as root, drop it before the job, or set noise.drop_page_cache to false",
            evidence={"path": str(path), "errno": error.errno},
        )
    return Finding("noise.page_cache_dropped", Severity.INFO, 0, "the page cache was dropped")
