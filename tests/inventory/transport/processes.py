"""Finding what a command left behind, by an argument that nothing else on the machine has."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path


def unique_sleep() -> str:
    """Seconds for ``sleep``: over an hour, and found by `alive`."""
    return f"{4000 + secrets.randbelow(5000)}.{secrets.randbelow(10**9):09d}"


def alive(marker: str) -> list[int]:
    """Processes that have `marker` in their arguments; a shell that got it through its stdin has not."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if marker.encode() in arguments:
            found.append(int(entry.name))
    return found


def wait_for(marker: str, count: int, seconds: float = 15.0) -> list[int]:
    """The processes once there are `count` of them."""
    deadline = time.monotonic() + seconds
    while len(alive(marker)) != count:
        assert time.monotonic() < deadline, f"{len(alive(marker))} processes have {marker}, not {count}"
        time.sleep(0.05)
    return alive(marker)
