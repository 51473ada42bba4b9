"""The ledger itself: opening it, reading it, and a writer's turn."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from inventory.ledger import migrate, queries
from inventory.ledger.engine import (
    empty_engine,
    explained,
    postgres_engine,
    reading,
    sqlite_engine,
    writing,
)
from inventory.ledger.errors import LedgerBusy, LedgerError
from inventory.ledger.place import Place, find_place
from inventory.ledger.records import Event, MeasurementRow, NodeState, Pruned, Run, VerdictRow
from inventory.ledger.schema import HEAD
from inventory.ledger.transaction import Transaction
from inventory.lifecycle import State


class Ledger:
    """An open ledger; a context manager that closes it. Made by :func:`inventory.ledger.open_ledger`.

    Every writing method is one transaction, and is on disk when it returns. Methods may be called from
    several threads. All of them raise LedgerError when the file or database fails them.
    """

    def __init__(
        self, place: Place, engine: Engine, clock: Callable[[], float], read_only: bool, note: str
    ) -> None:
        self._place, self._engine, self._clock = place, engine, clock
        self._note = note
        self._turn = threading.local()
        self._pid = os.getpid()
        self.read_only = read_only

    def __str__(self) -> str:
        return f"{self._place}{self._note}"

    def __repr__(self) -> str:
        return f"<Ledger {self}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Nothing is pending: what was acknowledged is on disk already."""
        if os.getpid() == self._pid:
            self._engine.dispose()

    @classmethod
    def open(cls, url: str | Path, clock: Callable[[], float], *, read_only: bool, timeout: float) -> Self:
        """As :func:`inventory.ledger.open_ledger`."""
        place = find_place(url)
        with explained(place):
            if place.path is not None:
                engine, note = _open_file(place, place.path, read_only, timeout)
            else:
                engine, note = _open_database(place, read_only, timeout)
        return cls(place, engine, clock, read_only, note)

    # Reading

    def states(self, names: Iterable[str] | None) -> dict[str, NodeState]:
        """The current state of each node of `names`, in that order; None asks for all that the ledger knows.

        A node that the ledger has never seen is `new`, since None.
        """
        with self._reading() as connection:
            return queries.states_of(connection, names)

    def events(
        self,
        node: str | None = None,
        kind: str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[Event]:
        """Events in the order in which they happened; the newest `limit` of those that fit.

        `kind` is ``transition`` or what record_event was given; `since` is seconds since the epoch,
        inclusive.
        """
        with self._reading() as connection:
            return queries.events_of(connection, node, kind, since, limit)

    def runs(self, kind: str | None = None, limit: int | None = None) -> list[Run]:
        """Runs, newest first; those that never finished too."""
        with self._reading() as connection:
            return queries.runs_of(connection, kind, limit)

    def run(self, id_: str) -> Run:
        """The run with this id, or the only one whose id begins so; LedgerError for none or several."""
        with self._reading() as connection:
            return queries.run_of(connection, id_)

    def verdicts(self, run: str) -> list[VerdictRow]:
        """The verdicts of a run, in the order in which they were recorded; empty for a run without any."""
        with self._reading() as connection:
            return queries.verdicts_of(connection, run)

    def last_verdict(self, node: str) -> VerdictRow | None:
        """The newest verdict on a node, whichever run gave it."""
        with self._reading() as connection:
            return queries.last_verdict_of(connection, node)

    def skus(self, since: float) -> set[str | None]:
        """SKUs of the nodes that were judged since then; None among them for nodes of which none is known."""
        with self._reading() as connection:
            return queries.skus_of(connection, since)

    def measurements(
        self,
        metric_names: Iterable[str],
        sku: str | None,
        since: float | None = None,
        healthy_only: bool = True,
        limit: int = 4096,
    ) -> dict[str, list[tuple[str, float]]]:
        """For each metric the (node, value) pairs that nodes of `sku` gave, newest run first, at most `limit`
        a metric.

        `sku` None means nodes of which no SKU is known. `healthy_only` leaves out nodes that their own run
        did not find healthy. Every asked metric has a key; the list is empty where nothing was measured.
        """
        with self._reading() as connection:
            return queries.measurements_of(
                connection, list(metric_names), sku, since=since, healthy_only=healthy_only, limit=limit
            )

    def check(self) -> list[str]:
        """What is inconsistent, one line each; empty for a sound ledger. Reads all of it."""
        with self._reading() as connection:
            return queries.problems_of(connection)

    # Writing

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One writer's turn, the same on both databases: no other process or thread writes until the block
        ends.

        What it reads (states, budgets, reservations) stays true until then; its changes appear together when
        the block ends, and not at all if it raises. Keep it short: others wait, and give up with LedgerBusy
        after the ledger's time limit.
        """
        self._guard()
        if self.read_only:
            raise LedgerError(f"the ledger {self} was opened for reading only")
        if getattr(self._turn, "taken", False):
            raise RuntimeError(
                "this thread has a transaction already; use that one's methods inside its block"
            )
        self._turn.taken = True
        try:
            with explained(self._place), writing(self._engine) as connection:
                yield Transaction(connection, self._clock)
        finally:
            self._turn.taken = False

    def transition(
        self,
        node: str,
        to: State | str,
        actor: str,
        reason: str,
        evidence: Mapping[str, Any],
        *,
        run: str | None = None,
        expect: State | str | None = None,
    ) -> Event:
        """Move a node to another state, with the event that says who did it, why, and what shows it.

        `expect` makes it a compare-and-set: StateChanged if the node is in another state by now.
        IllegalTransition, listing the legal next states, if the lifecycle has no such way. Many nodes are
        moved fastest inside one :meth:`transaction`.
        """
        with self.transaction() as tx:
            return tx.transition(node, to, actor, reason, evidence, run=run, expect=expect)

    def record_event(
        self,
        kind: str,
        node: str | None = None,
        *,
        actor: str,
        reason: str,
        evidence: Mapping[str, Any],
        run: str | None = None,
    ) -> Event:
        """Record something that happened and changed no state."""
        with self.transaction() as tx:
            return tx.record_event(kind, node, actor=actor, reason=reason, evidence=evidence, run=run)

    def begin_run(self, kind: str, plan: str, actor: str, selection: str) -> str:
        """Note that a run begins; gives its id, which sorts by time."""
        with self.transaction() as tx:
            return tx.begin_run(kind, plan, actor, selection)

    def record_verdicts(
        self, run: str, rows: Sequence[VerdictRow], measurements: Iterable[MeasurementRow] = ()
    ) -> int:
        """Record verdicts of a run and what was measured on those nodes, all in one transaction.

        May be called several times a run, with other nodes each time; ValueError for a node's second verdict
        and for a measurement of a node without one. NaN and infinities are left out: nothing can be learned
        from them. Gives the number of measurements that were kept.
        """
        with self.transaction() as tx:
            return tx.record_verdicts(run, rows, measurements)

    def finish_run(self, run: str, summary: Mapping[str, Any]) -> None:
        """Note that a run has ended, and how; ValueError for a run that is unknown or has ended before."""
        with self.transaction() as tx:
            tx.finish_run(run, summary)

    def prune(self, before: float, actor: str = "ltpctl") -> Pruned:
        """Forget measurements, verdicts and runs from before a time; leaves an event that says how many.

        Events and states are kept for ever, and so is the newest verdict of each node with its run.
        """
        with self.transaction() as tx:
            return tx.prune(before, actor)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._guard()
        with explained(self._place), reading(self._engine) as connection:
            yield connection

    def _guard(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a ledger belongs to the process that opened it; open it again after a fork")


def _open_database(place: Place, read_only: bool, timeout: float) -> tuple[Engine, str]:
    engine = postgres_engine(place, timeout)
    try:
        with reading(engine) as connection:
            current = migrate.revision(connection, place)
        if current is None and read_only:
            engine.dispose()
            return empty_engine(), " (nothing in it yet)"
        if current != HEAD:
            migrate.upgrade(engine, place)
    except BaseException:
        engine.dispose()
        raise
    return engine, ""


def _open_file(place: Place, path: Path, read_only: bool, timeout: float) -> tuple[Engine, str]:
    if path.is_dir():
        raise LedgerError(
            f"{path} is a folder; the ledger is a file: name one in it, such as {path / 'ledger.db'}"
        )
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be opened: {error.strerror}") from None
    _refuse_cut_off(path, size)
    if read_only:
        if size == 0:
            return empty_engine(), " (nothing in it yet)"
        return _open_to_read(place, path, timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise LedgerError(f"the ledger's folder {path.parent} cannot be made: {error.strerror}") from None
    for needed in (path.parent, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise LedgerError(f"the ledger {path} cannot be written: {needed} is not writable by this user")
    engine = sqlite_engine(path, timeout, "rwc")
    try:
        if _revision(engine, place) != HEAD:
            _use_write_ahead_log(engine, timeout)
            migrate.upgrade(engine, place)
    except BaseException:
        engine.dispose()
        raise
    return engine, ""


def _open_to_read(place: Place, path: Path, timeout: float) -> tuple[Engine, str]:
    engine = sqlite_engine(path, timeout, "ro")
    try:
        try:
            current = _revision(engine, place)
        except DBAPIError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF not in {
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            }:
                raise
            # Its folder cannot take the files that readers share. Without a log nobody is writing: read it
            # plainly.
            engine.dispose()
            if _log_size(path) > 0:
                raise LedgerError(
                    f"the newest changes of the ledger {path} are in {path.name}-wal and cannot be "
                    "read in this folder; copy both files to a folder that this user can write"
                ) from None
            engine = sqlite_engine(path, timeout, "immutable")
            current = _revision(engine, place)
        if current is None:
            engine.dispose()
            return empty_engine(), " (nothing in it yet)"
        if current != HEAD:
            engine.dispose()
            _open_file(place, path, False, timeout)[0].dispose()
            engine = sqlite_engine(path, timeout, "ro")
    except BaseException:
        engine.dispose()
        raise
    return engine, ""


def _revision(engine: Engine, place: Place) -> str | None:
    with reading(engine) as connection:
        return migrate.revision(connection, place)


def _use_write_ahead_log(engine: Engine, timeout: float) -> None:
    """Readers then never wait for writers. Kept in the file, so it is said once, when the file is made."""
    deadline = time.monotonic() + timeout
    while True:
        # SQLite does not queue for this change: of two processes that make it, one is told to come again.
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise
            if time.monotonic() > deadline:
                raise LedgerBusy(
                    "the ledger is being made by another process, which does not finish"
                ) from None
            time.sleep(0.01)
        finally:
            raw.close()


def _log_size(path: Path) -> int:
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except OSError:
        return 0


def _refuse_cut_off(path: Path, size: int) -> None:
    # SQLite would take the empty file for a new one and throw the log, with all that is left, away.
    if size == 0 and _log_size(path) > 0 and (not path.exists() or path.stat().st_size == 0):
        raise LedgerError(
            f"the ledger {path} is empty but {path.name}-wal is not: it was cut off or removed; "
            "restore it from a backup, or move both away to begin a new one"
        )
