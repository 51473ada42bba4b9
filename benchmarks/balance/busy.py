"""The competitor: a process that takes what one core gives it."""

from __future__ import annotations

import os


def compute(core: int) -> None:
    """Without end."""
    os.sched_setaffinity(0, {core})
    while True:
        pass
