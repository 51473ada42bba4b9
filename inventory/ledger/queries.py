"""Questions to the ledger, each on a connection, so that readers and transactions share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select, union_all

from inventory.ledger.encoding import from_json
from inventory.ledger.errors import LedgerError
from inventory.ledger.records import Event, NodeState, Run, VerdictRow
from inventory.ledger.schema import events, measurements, metrics, nodes, runs, verdicts
from inventory.lifecycle import State

TRANSITION = "transition"

_NAMES_AT_ONCE = 500
"""More names than this are looked for in the whole table: a database limits the parameters of a statement."""
_METRICS_AT_ONCE = 200
"""SQLite joins at most 500 SELECTs into one."""


def states_of(connection: Connection, names: Iterable[str] | None) -> dict[str, NodeState]:
    wanted = None if names is None else list(dict.fromkeys(names))
    query = (
        select(
            nodes.c.node,
            nodes.c.state,
            *(events.c[k] for k in ("time", "reason", "actor", "run", "evidence")),
        )
        .join(events, events.c.id == nodes.c.event)
        .order_by(nodes.c.node)
    )
    if wanted is not None and len(wanted) <= _NAMES_AT_ONCE:
        query = query.where(nodes.c.node.in_(wanted))
    found = {
        row.node: NodeState(
            row.node, _state(row.state), row.time, row.reason, row.actor, row.run, from_json(row.evidence)
        )
        for row in connection.execute(query)
    }
    if wanted is None:
        return found
    return {name: found.get(name) or NodeState(name, State.NEW) for name in wanted}


def events_of(
    connection: Connection, node: str | None, kind: str | None, since: float | None, limit: int | None
) -> list[Event]:
    query = select(events).order_by(events.c.id.desc()).limit(limit)
    if node is not None:
        query = query.where(events.c.node == node)
    if kind is not None:
        query = query.where(events.c.kind == kind)
    if since is not None:
        query = query.where(events.c.time >= since)
    return [_event(row) for row in connection.execute(query)][::-1]


def run_of(connection: Connection, id_: str) -> Run:
    """The run with this id, or the only one whose id begins so."""
    query = select(runs).where(func.substr(runs.c.id, 1, len(id_)) == id_).order_by(runs.c.id).limit(2)
    found = [_run(row) for row in connection.execute(query)] if id_ else []
    if not found:
        raise LedgerError(f"the ledger has no run '{id_}'")
    if len(found) > 1 and found[0].id != id_:
        raise LedgerError(
            f"several runs begin with '{id_}' ({found[0].id}, {found[1].id}, ...); give more of the id"
        )
    return found[0]


def runs_of(connection: Connection, kind: str | None, limit: int | None) -> list[Run]:
    query = select(runs).order_by(runs.c.started.desc(), runs.c.id.desc()).limit(limit)
    if kind is not None:
        query = query.where(runs.c.kind == kind)
    return [_run(row) for row in connection.execute(query)]


def verdicts_of(connection: Connection, run: str) -> list[VerdictRow]:
    query = select(verdicts).where(verdicts.c.run == run).order_by(verdicts.c.id)
    return [_verdict(row) for row in connection.execute(query)]


def last_verdict_of(connection: Connection, node: str) -> VerdictRow | None:
    query = select(verdicts).where(verdicts.c.node == node).order_by(verdicts.c.id.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else _verdict(row)


def skus_of(connection: Connection, since: float) -> set[str | None]:
    query = select(verdicts.c.sku).where(verdicts.c.time >= since).distinct()
    return set(connection.execute(query).scalars())


def measurements_of(
    connection: Connection,
    names: Sequence[str],
    sku: str | None,
    *,
    since: float | None,
    healthy_only: bool,
    limit: int,
) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    chosen = list(found)
    for start in range(0, len(chosen), _METRICS_AT_ONCE):
        ids = connection.execute(
            select(metrics.c.id, metrics.c.name).where(
                metrics.c.name.in_(chosen[start : start + _METRICS_AT_ONCE])
            )
        ).all()
        if not ids:
            continue
        # One SELECT a metric, so that each walks the key backwards and stops at its limit.
        parts = [_newest(row.id, sku, since, healthy_only, limit).subquery() for row in ids]
        name_of = {row.id: row.name for row in ids}
        for metric, node, value in connection.execute(union_all(*(select(part) for part in parts))):
            found[name_of[metric]].append((node, value))
    return found


def fold(history: Iterable[Event]) -> dict[str, State]:
    """The states that the transitions among `history` (in order) add up to."""
    return {
        e.node: e.target
        for e in history
        if e.kind == TRANSITION and e.node is not None and e.target is not None
    }


def problems_of(connection: Connection) -> list[str]:
    """What is inconsistent; empty for a sound ledger. Reads everything."""
    found: list[str] = []
    if connection.dialect.name == "sqlite":
        answers = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        found += [f"integrity_check: {answer}" for answer in answers if answer != "ok"]
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        found += [f"{row[0]}: a row refers to {row[2]}, which has no such row" for row in broken]
    history = events_of(connection, None, TRANSITION, None, None)
    at: dict[str, State] = {}
    for event in history:
        if event.node is None or event.target is None:
            found.append(f"event {event.id}: a transition without a node or a target")
            continue
        before = at.get(event.node, State.NEW)
        if event.source != before:
            found.append(f"event {event.id}: {event.node} left {event.source} but was {before}")
        at[event.node] = event.target
    shown = {name: entry.state for name, entry in states_of(connection, None).items()}
    for name in sorted(shown.keys() | at.keys()):
        if shown.get(name) != at.get(name):
            found.append(f"{name}: stands as {shown.get(name)}, its events say {at.get(name)}")
    return found


def _newest(metric: int, sku: str | None, since: float | None, healthy_only: bool, limit: int) -> Select[Any]:
    query = (
        select(measurements.c.metric, verdicts.c.node, measurements.c.value)
        .join(verdicts, verdicts.c.id == measurements.c.verdict)
        .where(measurements.c.metric == metric)
        .where(verdicts.c.sku.is_(None) if sku is None else verdicts.c.sku == sku)
        .order_by(measurements.c.verdict.desc(), measurements.c.device, measurements.c.repeat)
        .limit(limit)
    )
    if healthy_only:
        query = query.where(verdicts.c.verdict == "healthy")
    if since is not None:
        first = select(func.min(verdicts.c.id)).where(verdicts.c.time >= since).scalar_subquery()
        # The first condition lets the walk stop; the second is the exact one, should the clock have gone
        # back.
        query = query.where(measurements.c.verdict >= first, verdicts.c.time >= since)
    return query


def _state(name: str) -> State:
    try:
        return State(name)
    except ValueError:
        raise LedgerError(f"the ledger holds a state that this program does not know: '{name}'") from None


def _event(row: Row[Any]) -> Event:
    return Event(
        id=row.id,
        time=row.time,
        kind=row.kind,
        node=row.node,
        actor=row.actor,
        reason=row.reason,
        evidence=from_json(row.evidence),
        run=row.run,
        source=None if row.source is None else _state(row.source),
        target=None if row.target is None else _state(row.target),
    )


def _run(row: Row[Any]) -> Run:
    summary: Mapping[str, Any] = from_json(row.summary)
    return Run(row.id, row.kind, row.started, row.finished, row.plan, row.actor, row.selection, summary)


def _verdict(row: Row[Any]) -> VerdictRow:
    return VerdictRow(
        node=row.node,
        verdict=row.verdict,
        sku=row.sku,
        findings=tuple(from_json(row.findings)),
        checks=from_json(row.checks),
        seconds=row.seconds,
        run=row.run,
        time=row.time,
    )
