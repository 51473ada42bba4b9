"""The store: append-only events, the node states that follow from them, validation runs and their numbers.

``with open_ledger("ledger.db") as ledger: ledger.states(None)``. A path or ``sqlite:`` URL is an
SQLite file, a ``postgresql:`` URL a PostgreSQL database; both behave alike. SQLAlchemy is imported when a
ledger is opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from inventory.ledger.errors import LedgerBusy, LedgerError, StateChanged
from inventory.ledger.records import Event, MeasurementRow, NodeState, Pruned, Run, VerdictRow
from inventory.lifecycle import IllegalTransition

if TYPE_CHECKING:
    from inventory.ledger.store import Ledger
    from inventory.ledger.transaction import Transaction

__all__ = [
    "Event",
    "IllegalTransition",
    "Ledger",
    "LedgerBusy",
    "LedgerError",
    "MeasurementRow",
    "NodeState",
    "Pruned",
    "Run",
    "StateChanged",
    "Transaction",
    "VerdictRow",
    "open_ledger",
]


def open_ledger(
    url: str | Path,
    clock: Callable[[], float] = time.time,
    *,
    read_only: bool = False,
    timeout: float = 60.0,
) -> Ledger:
    """Open the ledger at `url`, made or brought up to date if need be.

    `url` is the path of an SQLite file, ``sqlite:///PATH``, or
    ``postgresql://[USER[:PASSWORD]@]HOST/DATABASE``. `clock` gives the time of what is recorded, in seconds
    since the epoch. With `read_only` nothing is created and every writing method is refused; a file that does
    not exist is then an empty ledger. `timeout` is how long, in seconds, a writer waits for its turn before
    it gives up with LedgerBusy.

    Raises LedgerError, with one line that says what to do, for a file that is damaged, is something else, was
    written by a newer version of this program, or cannot be opened. Such a file is left as it is.

    A ledger belongs to the process that opened it; a child process opens its own.
    """
    from inventory.ledger.store import Ledger

    return Ledger.open(url, clock, read_only=read_only, timeout=timeout)


def __getattr__(name: str) -> object:
    """`Ledger` and `Transaction` by name without making everybody pay for the import of SQLAlchemy."""
    if name == "Ledger":
        from inventory.ledger.store import Ledger

        return Ledger
    if name == "Transaction":
        from inventory.ledger.transaction import Transaction

        return Transaction
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
