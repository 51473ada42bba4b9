"""The competitor: a process that takes what one core gives it."""

from __future__ import annotations

import os
from multiprocessing.synchronize import Event


def compute(core: int, begun: Event) -> None:
    """Without end."""
    os.sched_setaffinity(0, {core})
    begun.set()
    while True:
        pass
