"""Open files: what a process may have by default (1,024) is less than a large fan-out needs."""

from __future__ import annotations

import resource

A_COMMAND = 2
"""A connection, and a proxy command's end or a local child's second pipe."""

OTHERS = 128
"""For the ledger, reports, the event loop, jump hosts."""


def needed(concurrency: int) -> int:
    """Open files for so many commands at once."""
    return A_COMMAND * concurrency + OTHERS


def allowed_at_once(concurrency: int) -> int:
    """How many of `concurrency` commands this process may run at once, its soft limit raised for them.

    Beyond the hard limit a node would seem to fail that was never asked.
    """
    wanted = needed(concurrency)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return concurrency
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, min(concurrency, (most - OTHERS) // A_COMMAND))
