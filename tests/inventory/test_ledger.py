"""What the ledger keeps and gives back, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest

from inventory.errors import UsageError
from inventory.ledger import (
    IllegalTransition,
    Ledger,
    LedgerBusy,
    LedgerError,
    MeasurementRow,
    StateChanged,
    VerdictRow,
    open_ledger,
)
from inventory.lifecycle import State
from tests.inventory.conftest import Clock


@pytest.fixture
def ledger(ledger_url: str, clock: Clock) -> Iterator[Ledger]:
    with open_ledger(ledger_url, clock) as opened:
        yield opened


def test_a_node_never_seen_is_new(ledger: Ledger) -> None:
    state = ledger.states(["ghost"])["ghost"]
    assert (state.state, state.since, state.evidence) == (State.NEW, None, {})
    assert ledger.states(None) == {}


def test_a_transition_changes_the_state_and_leaves_an_event_with_its_proof(
    ledger: Ledger, clock: Clock
) -> None:
    clock.now = 1_700_000_123.456789
    evidence = {"findings": [{"check": "accelerator.ecc", "value": 3, "device": "0"}], "ratio": 0.1 + 0.2}
    made = ledger.transition("node001", "cordoned", "alice", "ECC errors", evidence, run="r1")
    assert ledger.events() == [made]
    assert (made.kind, made.source, made.target) == ("transition", State.NEW, State.CORDONED)
    assert (made.node, made.actor, made.reason, made.run) == ("node001", "alice", "ECC errors", "r1")
    state = ledger.states(None)["node001"]
    assert state.state is State.CORDONED
    assert state.since == 1_700_000_123.456789
    assert (state.reason, state.actor, state.run) == ("ECC errors", "alice", "r1")
    assert state.evidence == evidence


def test_states_come_in_the_order_asked_for_also_for_thousands_of_names(ledger: Ledger) -> None:
    ledger.transition("node7", "available", "a", "ok", {})
    names = [f"node{i}" for i in range(3000, 0, -1)]
    states = ledger.states(names)
    assert list(states) == names
    assert [name for name, entry in states.items() if entry.state is not State.NEW] == ["node7"]


def test_an_illegal_transition_is_refused_by_name_and_changes_nothing(ledger: Ledger) -> None:
    with pytest.raises(
        IllegalTransition, match=r"^node001: a node may not go from new to allocated.*may go to: av"
    ):
        ledger.transition("node001", "allocated", "a", "b", {})
    assert ledger.events() == []
    assert ledger.states(None) == {}


def test_an_unknown_state_is_refused(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="there is no node state 'broken'"):
        ledger.transition("node001", "broken", "a", "b", {})


def test_compare_and_set_refuses_when_the_state_has_changed(ledger: Ledger) -> None:
    ledger.transition("node001", "available", "a", "ok", {}, expect="new")
    with pytest.raises(StateChanged, match="node001 is available and no longer new"):
        ledger.transition("node001", "cordoned", "a", "bad", {}, expect="new")
    assert ledger.states(None)["node001"].state is State.AVAILABLE


@pytest.mark.parametrize(("actor", "reason"), [("", "why"), ("who", ""), ("who", "  ")])
def test_a_change_without_actor_or_reason_is_refused(ledger: Ledger, actor: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"needs its (actor|reason)"):
        ledger.transition("node001", "available", actor, reason, {})
    assert ledger.events() == []


def test_events_are_chosen_by_node_kind_and_time_and_the_newest_are_kept(
    ledger: Ledger, clock: Clock
) -> None:
    for i in range(6):
        clock.now += 1
        ledger.record_event("note", f"node{i % 2}", actor="a", reason=f"r{i}", evidence={"i": i})
    ledger.transition("node0", "available", "a", "ok", {})
    assert [e.reason for e in ledger.events("node0")] == ["r0", "r2", "r4", "ok"]
    assert [e.reason for e in ledger.events(kind="note", limit=2)] == ["r4", "r5"]
    assert [e.reason for e in ledger.events(since=clock.now)] == ["r5", "ok"]
    ids = [e.id for e in ledger.events()]
    assert ids == sorted(ids)


def test_an_event_that_is_no_transition_cannot_pose_as_one(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="transition"):
        ledger.record_event("transition", "node001", actor="a", reason="b", evidence={})


HOSTILE = "[red]\0 \ud800 \x1b[31m 'quoted'; DROP TABLE events; -- \u202e \U0001f525"


def test_text_that_nodes_send_is_kept_as_text_whatever_it_holds(ledger: Ledger) -> None:
    ledger.transition(HOSTILE, "cordoned", "a", HOSTILE, {"line": HOSTILE, HOSTILE: [HOSTILE]}, run="r")
    (event,) = ledger.events()
    shown = HOSTILE.replace("\0", "\\x00").replace("\ud800", "\\ud800")
    assert (event.node, event.reason) == (shown, shown)
    assert event.evidence == {"line": HOSTILE, HOSTILE: [HOSTILE]}
    assert ledger.states(None)[shown].state is State.CORDONED
    with pytest.raises(IllegalTransition, match="already cordoned"):
        ledger.transition(HOSTILE, "cordoned", "a", "b", {})


def test_numbers_that_json_lacks_are_kept_by_name(ledger: Ledger) -> None:
    ledger.record_event(
        "note", actor="a", reason="b", evidence={"loss": math.nan, "rate": [math.inf, -math.inf]}
    )
    assert ledger.events()[0].evidence == {"loss": "nan", "rate": ["inf", "-inf"]}


def test_evidence_that_is_no_data_is_refused(ledger: Ledger) -> None:
    with pytest.raises(TypeError, match="object cannot be kept"):
        ledger.record_event("note", actor="a", reason="b", evidence={"it": object()})
    assert ledger.events() == []


def test_a_run_is_recorded_from_beginning_to_end(ledger: Ledger, clock: Clock) -> None:
    run = ledger.begin_run("validate", "quick", "alice", "node[001-002]")
    assert ledger.run(run).finished is None
    clock.now += 12.5
    ledger.finish_run(run, {"healthy": 2})
    kept = ledger.run(run)
    assert (kept.kind, kept.plan, kept.actor, kept.selection) == (
        "validate",
        "quick",
        "alice",
        "node[001-002]",
    )
    assert kept.finished is not None
    assert kept.finished - kept.started == 12.5
    assert kept.summary == {"healthy": 2}
    with pytest.raises(ValueError, match="no unfinished run"):
        ledger.finish_run(run, {})


def test_run_ids_sort_by_time_and_the_newest_run_comes_first(ledger: Ledger, clock: Clock) -> None:
    made = []
    for kind in ("validate", "sweep", "validate"):
        clock.now += 0.001
        made.append(ledger.begin_run(kind, "quick", "a", "all"))
    assert made == sorted(made)
    assert [run.id for run in ledger.runs()] == made[::-1]
    assert [run.id for run in ledger.runs("validate", limit=1)] == [made[2]]


def test_a_run_is_found_by_the_beginning_of_its_id_unless_several_fit(ledger: Ledger, clock: Clock) -> None:
    first = ledger.begin_run("validate", "quick", "a", "all")
    clock.now += 3600
    ledger.begin_run("validate", "quick", "a", "all")
    assert ledger.run(first[:15]).id == first
    with pytest.raises(LedgerError, match="several runs begin with '2023'"):
        ledger.run("2023")
    for absent in ("1999", "", "%"):
        with pytest.raises(LedgerError, match="no run"):
            ledger.run(absent)


def test_verdicts_come_back_as_they_were_given(ledger: Ledger, clock: Clock) -> None:
    run = ledger.begin_run("validate", "quick", "a", "all")
    row = VerdictRow(
        "node001",
        "unhealthy",
        "h100",
        ({"check": "a.b", "value": 3, "evidence": ["x"]},),
        {"a.b": "fail"},
        1.25,
    )
    ledger.record_verdicts(run, [row, VerdictRow("node002", "unknown")])
    first, second = ledger.verdicts(run)
    assert (first.node, first.verdict, first.sku, first.seconds) == ("node001", "unhealthy", "h100", 1.25)
    assert list(first.findings) == list(row.findings)
    assert first.checks == {"a.b": "fail"}
    assert (first.run, first.time) == (run, clock.now)
    assert (second.sku, tuple(second.findings)) == (None, ())


def test_the_last_verdict_is_the_newest_of_all_runs(ledger: Ledger) -> None:
    for verdict in ("healthy", "degraded"):
        ledger.record_verdicts(
            ledger.begin_run("validate", "q", "a", "all"), [VerdictRow("node001", verdict)]
        )
    last = ledger.last_verdict("node001")
    assert last is not None
    assert last.verdict == "degraded"
    assert ledger.last_verdict("node002") is None


def test_a_second_verdict_on_a_node_in_one_run_is_refused_whole(ledger: Ledger) -> None:
    run = ledger.begin_run("validate", "quick", "a", "all")
    ledger.record_verdicts(run, [VerdictRow("node001", "healthy")])
    for rows in (
        [VerdictRow("node002", "healthy"), VerdictRow("node001", "unknown")],
        [VerdictRow("n", "x")] * 2,
    ):
        with pytest.raises(ValueError, match="has a verdict for"):
            ledger.record_verdicts(run, rows)
    assert [row.node for row in ledger.verdicts(run)] == ["node001"]


def test_verdicts_of_an_unknown_run_and_numbers_without_a_verdict_are_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="no run 'nowhere'"):
        ledger.record_verdicts("nowhere", [VerdictRow("node001", "healthy")])
    run = ledger.begin_run("validate", "quick", "a", "all")
    with pytest.raises(ValueError, match="node002 has no verdict"):
        ledger.record_verdicts(
            run, [VerdictRow("node001", "healthy")], [MeasurementRow("node002", "a.b.c", 1.0)]
        )
    assert ledger.verdicts(run) == []


def _measure(ledger: Ledger, verdicts: dict[str, str], value: float, sku: str | None = "h100") -> None:
    ledger.record_verdicts(
        ledger.begin_run("validate", "quick", "a", "all"),
        [VerdictRow(node, verdict, sku) for node, verdict in verdicts.items()],
        [
            MeasurementRow(node, "compute.gemm.rate", value, device)
            for node in verdicts
            for device in ("0", "1")
        ],
    )


def test_the_skus_are_those_of_the_nodes_judged_since_then(ledger: Ledger, clock: Clock) -> None:
    _measure(ledger, {"node001": "healthy"}, 1.0, sku="a100")
    clock.now += 100
    since = clock.now
    assert ledger.skus(since) == set()
    _measure(ledger, {"node001": "healthy", "node002": "unhealthy"}, 1.0, sku="h100")
    _measure(ledger, {"node003": "unknown"}, 1.0, sku=None)
    assert ledger.skus(since) == {"h100", None}


def test_baselines_come_newest_first_from_healthy_nodes_of_one_sku(ledger: Ledger) -> None:
    _measure(ledger, {"node001": "healthy", "node002": "unhealthy"}, 1.0)
    _measure(ledger, {"node001": "healthy"}, 2.0)
    _measure(ledger, {"node003": "healthy"}, 9.0, sku="mi300x")
    _measure(ledger, {"node004": "healthy"}, 7.0, sku=None)
    asked = ["compute.gemm.rate", "never.measured.this"]
    assert ledger.measurements(asked, "h100") == {
        "compute.gemm.rate": [("node001", 2.0), ("node001", 2.0), ("node001", 1.0), ("node001", 1.0)],
        "never.measured.this": [],
    }
    assert ledger.measurements(asked, None)["compute.gemm.rate"] == [("node004", 7.0)] * 2
    every = ledger.measurements(asked, "h100", healthy_only=False)["compute.gemm.rate"]
    assert sorted({node for node, _ in every}) == ["node001", "node002"]


def test_baselines_are_limited_by_number_and_by_time(ledger: Ledger, clock: Clock) -> None:
    for value in range(5):
        clock.now += 100
        _measure(ledger, {"node001": "healthy"}, float(value))
    assert [
        v for _, v in ledger.measurements(["compute.gemm.rate"], "h100", limit=3)["compute.gemm.rate"]
    ] == [4, 4, 3]
    recent = ledger.measurements(["compute.gemm.rate"], "h100", since=clock.now - 100)["compute.gemm.rate"]
    assert [v for _, v in recent] == [4, 4, 3, 3]


def test_a_baseline_over_more_metrics_than_one_statement_takes_is_complete(ledger: Ledger) -> None:
    names = [f"family.check.m{i}" for i in range(450)]
    run = ledger.begin_run("validate", "quick", "a", "all")
    numbers = [MeasurementRow("node001", name, float(i)) for i, name in enumerate(names)]
    assert ledger.record_verdicts(run, [VerdictRow("node001", "healthy", "h100")], numbers) == 450
    assert ledger.measurements(names, "h100") == {
        name: [("node001", float(i))] for i, name in enumerate(names)
    }


def test_repeats_are_all_kept_and_what_is_no_number_is_left_out(ledger: Ledger) -> None:
    run = ledger.begin_run("validate", "quick", "a", "all")
    numbers = [
        MeasurementRow("node001", "a.b.c", value, "0") for value in (1.5, math.nan, 1.5, math.inf, 0.1 + 0.2)
    ]
    assert ledger.record_verdicts(run, [VerdictRow("node001", "healthy", "h100")], numbers) == 3
    assert [v for _, v in ledger.measurements(["a.b.c"], "h100")["a.b.c"]] == [1.5, 1.5, 0.1 + 0.2]


def test_a_large_run_is_recorded_and_read_within_seconds(ledger: Ledger, clock: Clock) -> None:
    nodes = [f"node{i:04}" for i in range(2048)]
    names = [f"family.check.m{i}" for i in range(40)]
    run = ledger.begin_run("validate", "standard", "a", "all")
    rows = [VerdictRow(node, "healthy", "h100", (), dict.fromkeys(names, "pass"), 1.0) for node in nodes]
    numbers = [MeasurementRow(node, name, 1.0, "0") for node in nodes for name in names]
    started = time.process_time()
    assert ledger.record_verdicts(run, rows, numbers) == 81_920
    found = ledger.measurements(names, "h100", since=clock.now)
    with ledger.transaction() as tx:
        for node in nodes:
            tx.transition(node, "available", "validate", "healthy", {}, run=run)
    spent = time.process_time() - started
    assert all(len(values) == 2048 for values in found.values())
    assert len(ledger.states(None)) == 2048
    assert ledger.check() == []
    # Processor seconds of this process, so that a busy machine does not fail it; 2 are usual.
    assert spent < 8


def test_what_a_transaction_changes_appears_together_or_not_at_all(ledger: Ledger) -> None:
    def both() -> None:
        with ledger.transaction() as tx:
            tx.transition("node001", "available", "a", "ok", {})
            assert tx.states(["node001"])["node001"].state is State.AVAILABLE
            tx.transition("node002", "allocated", "a", "not legal", {})

    with pytest.raises(IllegalTransition):
        both()
    assert ledger.states(None) == {}
    assert ledger.events() == []


def test_a_reader_neither_waits_for_a_writer_nor_sees_half_of_its_work(ledger_url: str) -> None:
    with open_ledger(ledger_url) as writer, open_ledger(ledger_url, timeout=0.1) as reader:
        with writer.transaction() as tx:
            tx.transition("node001", "available", "a", "ok", {})
            assert reader.states(None) == {}
        assert list(reader.states(None)) == ["node001"]


def test_a_writer_whose_turn_does_not_come_gives_up_with_a_clear_line(ledger_url: str) -> None:
    with open_ledger(ledger_url) as first, open_ledger(ledger_url, timeout=0.2) as second:
        with first.transaction() as tx:
            tx.record_event("note", actor="a", reason="b", evidence={})
            with pytest.raises(LedgerBusy, match="kept busy by another process; nothing was changed"):
                second.record_event("note", actor="a", reason="b", evidence={})
        second.record_event("note", actor="a", reason="its turn came", evidence={})
        assert len(second.events()) == 2


def test_a_transaction_inside_a_transaction_is_a_bug_and_not_a_deadlock(ledger: Ledger) -> None:
    with ledger.transaction(), pytest.raises(RuntimeError, match="has a transaction already"):
        ledger.transition("node001", "available", "a", "ok", {})
    ledger.transition("node001", "available", "a", "ok", {})


def test_a_budget_checked_in_a_transaction_is_never_overdrawn_by_threads(ledger: Ledger) -> None:
    def take(node: str) -> None:
        with ledger.transaction() as tx:
            out = [n for n, s in tx.states(None).items() if s.state is State.CORDONED]
            if len(out) < 3:
                tx.transition(node, "cordoned", "sweep", "bad", {})

    threads = [threading.Thread(target=take, args=(f"node{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.states(None)) == 3


def test_pruning_forgets_old_runs_and_keeps_states_events_and_the_newest_verdicts(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.transition("node001", "available", "a", "ok", {})
    _measure(ledger, {"node001": "healthy", "node002": "healthy"}, 1.0)
    clock.now += 1000
    _measure(ledger, {"node001": "unhealthy"}, 2.0)
    pruned = ledger.prune(clock.now - 1, actor="alice")
    assert (pruned.runs, pruned.verdicts, pruned.measurements) == (0, 1, 4)
    assert [e.kind for e in ledger.events()] == ["transition", "pruned"]
    assert ledger.events()[-1].evidence["measurements"] == 4
    newest = [ledger.last_verdict(node) for node in ("node001", "node002")]
    assert [row.verdict for row in newest if row] == ["unhealthy", "healthy"]
    clock.now += 1000
    _measure(ledger, {"node001": "healthy", "node002": "healthy"}, 3.0)
    assert ledger.prune(clock.now - 1).runs == 2
    assert len(ledger.runs()) == 1
    assert list(ledger.states(None)) == ["node001"]
    assert ledger.check() == []


def test_events_refuse_to_be_changed_or_deleted_in_the_database_itself(ledger: Ledger) -> None:
    ledger.record_event("note", actor="a", reason="b", evidence={})
    statements = ["UPDATE events SET reason = 'c'", "DELETE FROM events"]
    if "postgresql" in str(ledger):
        statements.append("TRUNCATE events CASCADE")
    else:
        statements.append("INSERT OR REPLACE INTO events VALUES (1, 0, 'x', '', '', '', '{}', '', '', '')")
    for statement in statements:
        with pytest.raises(Exception, match="append-only"), ledger.transaction() as tx:
            tx.connection.exec_driver_sql(statement)
    assert [e.reason for e in ledger.events()] == ["b"]


def test_a_state_that_its_events_do_not_support_is_found_by_the_check(ledger: Ledger) -> None:
    ledger.transition("node001", "available", "a", "ok", {})
    assert ledger.check() == []
    with ledger.transaction() as tx:
        tx.connection.exec_driver_sql("UPDATE nodes SET state = 'held'")
    assert ledger.check() == ["node001: stands as held, its events say available"]


def test_a_closed_and_reopened_ledger_has_everything(ledger_url: str) -> None:
    with open_ledger(ledger_url) as first:
        first.transition("node001", "available", "a", "ok", {"x": 1})
        events = first.events()
    with open_ledger(ledger_url, read_only=True) as again:
        assert again.events() == events
        with pytest.raises(LedgerError, match="opened for reading only"):
            again.transition("node001", "held", "a", "b", {})


def test_a_reader_of_a_ledger_that_does_not_exist_sees_an_empty_one_and_makes_none(ledger_url: str) -> None:
    for _ in range(2):
        with open_ledger(ledger_url, read_only=True) as ledger:
            assert ledger.states(["node001"])["node001"].state is State.NEW
            assert (ledger.events(), ledger.runs(), ledger.last_verdict("node001"), ledger.check()) == (
                [],
                [],
                None,
                [],
            )
            assert ledger.measurements(["a.b.c"], "h100") == {"a.b.c": []}
            assert "nothing in it yet" in str(ledger)
