"""What a writer may do while it is its turn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from inventory import lifecycle
from inventory.errors import UsageError
from inventory.ledger import queries
from inventory.ledger.encoding import run_id, to_json, to_text
from inventory.ledger.errors import LedgerError, StateChanged
from inventory.ledger.records import Event, MeasurementRow, NodeState, Pruned, VerdictRow
from inventory.ledger.schema import events, metrics, nodes, runs, verdicts
from inventory.ledger.schema import measurements as measured
from inventory.lifecycle import State


class Transaction:
    """One writer's turn: what it reads stays true until the block ends, and its changes appear together or
    not at all.

    Made by :meth:`Ledger.transaction`. `connection` is SQLAlchemy's, for tables that other modules own.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float]) -> None:
        self.connection = connection
        self._clock = clock

    def states(self, names: Iterable[str] | None) -> dict[str, NodeState]:
        """As :meth:`Ledger.states`; nobody else can change them before this transaction ends."""
        return queries.states_of(self.connection, names)

    def events(
        self,
        node: str | None = None,
        kind: str | None = None,
        since: float | None = None,
        limit: int | None = None,
    ) -> list[Event]:
        """As :meth:`Ledger.events`."""
        return queries.events_of(self.connection, node, kind, since, limit)

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
        """As :meth:`Ledger.transition`."""
        row = self.connection.execute(select(nodes.c.state).where(nodes.c.node == to_text(node))).first()
        before = State.NEW if row is None else lifecycle.parse(row.state)
        if expect is not None and before is not lifecycle.parse(expect):
            raise StateChanged(
                f"{node} is {before} and no longer {lifecycle.parse(expect)}; nothing was changed"
            )
        try:
            target = lifecycle.transition(before, to).target
        except lifecycle.IllegalTransition as refusal:
            raise lifecycle.IllegalTransition(f"{node}: {refusal}") from None
        event = self._append(
            queries.TRANSITION, node, actor, reason, evidence, run=run, source=before, target=target
        )
        place = {"state": target.value, "event": event.id}
        if row is None:
            self.connection.execute(insert(nodes).values(node=event.node, **place))
        else:
            self.connection.execute(update(nodes).where(nodes.c.node == event.node).values(**place))
        return event

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
        """As :meth:`Ledger.record_event`."""
        if kind == queries.TRANSITION:
            raise ValueError("a transition is recorded by transition(), which also changes the state")
        return self._append(kind, node, actor, reason, evidence, run=run)

    def begin_run(self, kind: str, plan: str, actor: str, selection: str) -> str:
        """As :meth:`Ledger.begin_run`."""
        started = self._clock()
        made = run_id(started)
        self.connection.execute(
            insert(runs).values(
                id=made,
                kind=to_text(kind),
                started=started,
                plan=to_text(plan),
                actor=to_text(actor),
                selection=to_text(selection),
                summary="{}",
            )
        )
        return made

    def record_verdicts(
        self, run: str, rows: Sequence[VerdictRow], measurements: Iterable[MeasurementRow] = ()
    ) -> int:
        """As :meth:`Ledger.record_verdicts`."""
        if self.connection.execute(select(runs.c.id).where(runs.c.id == run)).first() is None:
            raise ValueError(f"there is no run {run!r} to record verdicts of")
        known = self._verdict_ids(run)
        names = [to_text(row.node) for row in rows]
        twice = known.keys() & set(names) or {name for name, count in Counter(names).items() if count > 1}
        if twice:
            raise ValueError(f"run {run} has a verdict for {sorted(twice)[0]} already")
        now = self._clock()
        if rows:
            self.connection.execute(
                insert(verdicts),
                [
                    {
                        "run": run,
                        "node": name,
                        "time": now,
                        "verdict": str(row.verdict),
                        "sku": None if row.sku is None else to_text(row.sku),
                        "seconds": row.seconds,
                        "findings": to_json(row.findings),
                        "checks": to_json(row.checks),
                    }
                    for name, row in zip(names, rows, strict=True)
                ],
            )
        return self._record_numbers(self._verdict_ids(run) if rows else known, measurements)

    def finish_run(self, run: str, summary: Mapping[str, Any]) -> None:
        """As :meth:`Ledger.finish_run`."""
        done = self.connection.execute(
            update(runs)
            .where(runs.c.id == run, runs.c.finished.is_(None))
            .values(finished=self._clock(), summary=to_json(summary))
        )
        if done.rowcount != 1:
            raise ValueError(f"there is no unfinished run {run!r}")

    def prune(self, before: float, actor: str) -> Pruned:
        """As :meth:`Ledger.prune`."""
        newest = select(func.max(verdicts.c.id)).group_by(verdicts.c.node)
        old = select(verdicts.c.id).where(verdicts.c.time < before)
        execute = self.connection.execute
        numbers = execute(delete(measured).where(measured.c.verdict.in_(old))).rowcount
        gone = execute(
            delete(verdicts).where(verdicts.c.time < before, verdicts.c.id.not_in(newest))
        ).rowcount
        empty = execute(
            delete(runs).where(runs.c.started < before, runs.c.id.not_in(select(verdicts.c.run)))
        ).rowcount
        pruned = Pruned(empty, gone, numbers)
        self.record_event(
            "pruned",
            actor=actor,
            reason="validation history is kept for a limited time",
            evidence={"before": before, "runs": empty, "verdicts": gone, "measurements": numbers},
        )
        return pruned

    def _append(
        self,
        kind: str,
        node: str | None,
        actor: str,
        reason: str,
        evidence: Mapping[str, Any],
        *,
        run: str | None = None,
        source: State | None = None,
        target: State | None = None,
    ) -> Event:
        for name, value in (("actor", actor), ("reason", reason)):
            if not value.strip():
                raise UsageError(f"a change in the ledger needs its {name}, and it is empty")
        values: dict[str, Any] = {
            "time": self._clock(),
            "kind": to_text(kind),
            "node": None if node is None else to_text(node),
            "actor": to_text(actor),
            "reason": to_text(reason),
            "run": run,
        }
        made = self.connection.execute(
            insert(events).returning(events.c.id),
            values | {"evidence": to_json(evidence), "source": source, "target": target},
        ).scalar_one()
        return Event(id=made, evidence=evidence, source=source, target=target, **values)

    def _verdict_ids(self, run: str) -> dict[str, int]:
        query = select(verdicts.c.node, verdicts.c.id).where(verdicts.c.run == run)
        return {row.node: row.id for row in self.connection.execute(query)}

    def _record_numbers(self, verdict_ids: Mapping[str, int], numbers: Iterable[MeasurementRow]) -> int:
        kept = [row for row in numbers if math.isfinite(row.value)]
        if not kept:
            return 0
        metric_ids = self._metric_ids({to_text(row.metric) for row in kept})
        repeats: Counter[tuple[int, int, str]] = Counter()
        lines: list[tuple[int, int, str, int, float]] = []
        for row in kept:
            verdict = verdict_ids.get(to_text(row.node))
            if verdict is None:
                raise ValueError(f"a measurement of {row.node} has no verdict of that node in the same run")
            key = (
                metric_ids[to_text(row.metric)],
                verdict,
                "" if row.device is None else to_text(row.device),
            )
            lines.append((*key, repeats[key], float(row.value)))
            repeats[key] += 1
        columns = "metric, verdict, device, repeat, value"
        # Not through SQLAlchemy's own insert: 80,000 rows at a time are common, and these take a third of its
        # time.
        if self.connection.dialect.name == "sqlite":
            statement = f"INSERT INTO measurements ({columns}) VALUES (?, ?, ?, ?, ?)"  # noqa: S608
            self.connection.exec_driver_sql(statement, lines)
        else:
            arrays = dict(zip("abcde", (list(column) for column in zip(*lines, strict=True)), strict=True))
            self.connection.exec_driver_sql(
                f"INSERT INTO measurements ({columns}) SELECT * FROM unnest("  # noqa: S608
                "%(a)s::integer[], %(b)s::bigint[], %(c)s::text[], %(d)s::integer[], %(e)s::float8[])",
                arrays,
            )
        return len(lines)

    def _metric_ids(self, names: set[str]) -> dict[str, int]:
        query = select(metrics.c.name, metrics.c.id)
        known = {row.name: row.id for row in self.connection.execute(query)}
        if missing := sorted(names - known.keys()):
            self.connection.execute(insert(metrics), [{"name": name} for name in missing])
            known = {row.name: row.id for row in self.connection.execute(query)}
        if unknown := names - known.keys():
            raise LedgerError(f"the ledger did not keep the metric {sorted(unknown)[0]}")
        return known
