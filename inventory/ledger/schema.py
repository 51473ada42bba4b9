"""The ledger's tables as the newest migration leaves them.

Times are seconds since the epoch (UTC) in double precision: differences need no parsing, and a clock comes
back with the same bits. JSON is kept as text, so that both databases give back what was written.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

REVISIONS = ("0001", "0002")
"""Every migration, in order. A ledger at any other revision was written by a newer program."""
HEAD = REVISIONS[-1]
VERSION_TABLE = "ledger_version"

# SQLite numbers rows by itself only in a column of type INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()

events = Table(
    "events",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("time", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("node", Text),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("run", Text),
    Column("source", Text),
    Column("target", Text),
    Index("events_by_node", "node", "id"),
    Index("events_by_kind", "kind", "id"),
    Index("events_by_time", "time"),
    sqlite_autoincrement=True,
)
"""What happened, in order. Triggers of the database refuse every UPDATE and DELETE."""

nodes = Table(
    "nodes",
    metadata,
    Column("node", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("event", _Id, ForeignKey("events.id"), nullable=False),
)
"""Current states: what the transitions among the events add up to, changed in the same transaction."""

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("started", Double, nullable=False),
    Column("finished", Double),
    Column("plan", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("selection", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Index("runs_by_start", "kind", "started"),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("run", Text, ForeignKey("runs.id"), nullable=False),
    Column("node", Text, nullable=False),
    Column("time", Double, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("sku", Text),
    Column("seconds", Double, nullable=False),
    Column("findings", Text, nullable=False),
    Column("checks", Text, nullable=False),
    UniqueConstraint("run", "node", name="verdicts_once_a_run"),
    Index("verdicts_by_node", "node", "id"),
    Index("verdicts_by_time", "time"),
    sqlite_autoincrement=True,
)

metrics = Table(
    "metrics",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
)
"""Names of metrics, so that a measurement is four numbers and not a line of text."""

measurements = Table(
    "measurements",
    metadata,
    Column("metric", Integer, primary_key=True, autoincrement=False),
    Column("verdict", _Id, primary_key=True, autoincrement=False),
    Column("device", Text, primary_key=True),
    Column("repeat", Integer, primary_key=True, autoincrement=False),
    Column("value", Double, nullable=False),
    sqlite_with_rowid=False,
)
"""Numbers for baselines. The key's order is the order in which a baseline reads: one metric, newest first.

No foreign keys: checking them would scan this table for each verdict that is pruned.
"""
