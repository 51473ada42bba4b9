"""The processes below the test's own, zombies included."""

from __future__ import annotations

import psutil


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}
