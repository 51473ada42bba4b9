"""Connections to both databases, a writer's turn, and their errors in one clear line."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from inventory.ledger.errors import LedgerBusy, LedgerError
from inventory.ledger.place import Place
from inventory.ledger.schema import metadata

_LOCK_CLASS = 0x6C7470
"""First half of PostgreSQL's advisory lock keys. The second is the schema: ledgers do not block another."""


def sqlite_engine(path: Path, timeout: float, mode: str) -> Engine:
    """`mode` is ``rwc`` (created if absent), ``rw``, ``ro``, or ``immutable`` (read without any lock)."""
    options = "immutable=1" if mode == "immutable" else f"mode={mode}"
    uri = f"file:{quote(str(path))}?{options}"

    def connect() -> sqlite3.Connection:
        # isolation_level None leaves BEGIN to us: the driver's own would begin writers without their turn.
        connection = sqlite3.connect(
            uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=QueuePool)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def empty_engine() -> Engine:
    """An empty ledger in memory, for readers of one that does not exist yet."""
    engine = create_engine(
        "sqlite+pysqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    metadata.create_all(engine)
    return engine


def postgres_engine(place: Place, timeout: float) -> Engine:
    """Needs psycopg 3; LedgerError if it is not installed."""
    assert place.url is not None
    arguments = {"connect_timeout": "10", "application_name": "ltpctl"}
    # What the URL says itself comes first.
    arguments = {key: value for key, value in arguments.items() if key not in place.url.query}
    try:
        engine = create_engine(place.url, connect_args=arguments, pool_pre_ping=True, hide_parameters=True)
    except ModuleNotFoundError:
        raise LedgerError(
            "a ledger on PostgreSQL needs psycopg, which is not installed: pip install 'ltpctl[postgres]'"
        ) from None

    def connected(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        # A commit that is acknowledged before it is on disk could be lost with the server.
        cursor.execute(
            "SELECT set_config('lock_timeout', %s, false),"
            " CASE WHEN current_setting('synchronous_commit') = 'off'"
            " THEN set_config('synchronous_commit', 'on', false) END",
            (f"{max(1, int(timeout * 1000))}ms",),
        )
        cursor.close()
        connection.commit()

    event.listen(engine, "connect", connected)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one moment of the ledger, whatever writers do meanwhile."""
    options: dict[str, Any] = {}
    if engine.dialect.name == "postgresql":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A connection whose turn it is: nobody else writes until the block ends. Commits, or rolls back."""
    with engine.connect().execution_options(ledger_writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            # READ COMMITTED on purpose: every statement after the lock sees all that its last holder
            # committed.
            connection.execute(
                text("SELECT pg_advisory_xact_lock(:class, hashtext(current_schema()::text))"),
                {"class": _LOCK_CLASS},
            )
        yield connection


def _begin_sqlite(connection: Connection) -> None:
    # A writer that began as a reader could not be given its turn later without failing with "locked".
    writes = connection.get_execution_options().get("ledger_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what the database says about its surroundings into LedgerError; bugs of our own stay bugs."""
    try:
        yield
    except DBAPIError as error:
        explanation = explain(place, error.orig)
        if explanation is None:
            raise
        # `from None`: the original carries connection arguments and parameters.
        raise explanation from None
    except sqlite3.Error as error:
        explanation = explain(place, error)
        if explanation is None:
            raise
        raise explanation from None


def explain(place: Place, error: BaseException | None) -> LedgerError | None:
    """The one line for `error`; None if it is not about the ledger's surroundings."""
    if isinstance(error, sqlite3.Error):
        return _explain_sqlite(place, error)
    if place.url is not None and error is not None:
        return _explain_postgres(place, error)
    return None


def _explain_sqlite(place: Place, error: sqlite3.Error) -> LedgerError | None:
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return LedgerBusy(
                f"the ledger {place} is kept busy by another process; nothing was changed, try again"
            )
        case sqlite3.SQLITE_FULL:
            return _disk_full(place)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return LedgerError(
                f"the ledger {place} is damaged or not an SQLite file ({error}); nothing was written to it: "
                "restore it from a backup, or move it away to begin a new one"
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return LedgerError(f"the ledger {place} cannot be written by this user ({error})")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR:
            if place.path is not None and _is_full(place.path.parent):
                return _disk_full(place)
            return LedgerError(
                f"the ledger {place} cannot be used: {error}; look at the file, its folder and its disk"
            )
        case _:
            return None


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 64 << 10
    except OSError:
        return False


def _disk_full(place: Place) -> LedgerError:
    return LedgerError(
        f"no space is left on the disk of the ledger {place}; the change was not recorded: free some"
    )


def _explain_postgres(place: Place, error: BaseException) -> LedgerError | None:
    state = getattr(error, "sqlstate", None)
    said = " ".join(place.scrub(str(error)).split())
    match state:
        case "55P03":
            return LedgerBusy(
                f"the ledger {place} is kept busy by another process; nothing was changed, try again"
            )
        case "53100":
            return LedgerError(
                f"no space is left for the ledger {place} on its server; the change was not recorded"
            )
        case "42501" | "25006":
            return LedgerError(f"the ledger {place} cannot be written by this user: {said}")
        case str() if state[:2] in {"08", "28", "3D", "53", "57", "58", "XX"}:
            return LedgerError(f"the ledger {place} cannot be used: {said}")
        case None if type(error).__name__ in {"OperationalError", "ProgrammingError", "InterfaceError"}:
            # No answer of a server: wrong host, refused, or broken off. A commit may have arrived all the
            # same.
            return LedgerError(f"the ledger {place} cannot be reached, or the connection broke off: {said}")
        case _:
            return None
