"""What is seen of an attempt, through its fault, to what is done: the parts fit each other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from probes.model import Verdict
from recovery.blame import Blame
from recovery.diagnose import waitfor
from recovery.supervise.detect import detect, hang_explained
from recovery.supervise.limits import Limits
from recovery.supervise.model import (
    Attempt,
    Budget,
    Decision,
    DecisionKind,
    Ending,
    Fault,
    FleetView,
    Probed,
    StopCause,
)
from recovery.supervise.policy import decide
from recovery.supervise.settings import Settings
from recovery.supervise.snapshot import FindingSeen, KernelSeen, NodeSeen, RankSeen, Snapshot
from recovery.supervise.stored import from_json, to_json
from recovery.supervise.words import Words

NOW = 1_700_000_000.0
WELL = tuple(Probed(node, Verdict.HEALTHY) for node in ("n1", "n2"))
FLEET = FleetView(("n1", "n2"), 2, spares=("s1",))


def see(*seen: RankSeen, **changes: Any) -> Snapshot:
    nodes = changes.pop("nodes", [NodeSeen("n1"), NodeSeen("n2")])
    return Snapshot(**{"now": NOW, "ranks": seen, "nodes": nodes, "step": 8, **changes})


def rank(number: int, status: int | None = None, **changes: Any) -> RankSeen:
    ended = None if status is None else NOW - 1
    return RankSeen(**{"rank": number, "node": f"n{number + 1}", "status": status, "ended": ended, **changes})


def attempt(number: int, faults: tuple[Fault, ...] = (), **changes: Any) -> Attempt:
    base = {"started": NOW - 60, "ended": NOW, "ending": Ending.FAILED, "last_step": 8, "durable_step": 5}
    return Attempt(**{"number": number, "nodes": ("n1", "n2"), "faults": faults, **base, **changes})


def answer(history: list[Attempt], faults: tuple[Fault, ...], fleet: FleetView = FLEET) -> Decision:
    """As it comes back from the ledger."""
    history = [from_json(Attempt, json.loads(json.dumps(to_json(each)))) for each in history]
    return decide(history, faults, Budget(len(history)), fleet, (), Settings(), NOW)


def test_a_killed_rank_is_probed_for_and_restarted_in_place() -> None:
    faults = detect(see(rank(0, 1), rank(1, -9)))
    first = answer([attempt(0)], faults)
    assert (first.kind, first.probe_nodes) == (DecisionKind.PROBE, ("n2", "n1"))
    second = answer([attempt(0)], faults, replace(FLEET, probed=WELL))
    assert (second.kind, second.nodes_out, second.wait_seconds) == (DecisionKind.RESTART, (), 0)


def test_a_gone_node_is_replaced() -> None:
    waiting = rank(0, quiet_seconds=80.0, heard=NOW - 1)
    faults = detect(see(waiting, rank(1), nodes=[NodeSeen("n1"), NodeSeen("n2", 9, NOW - 90)]))
    decision = answer([attempt(0, ending=None, ended=None)], faults)
    assert (decision.kind, decision.nodes_out, decision.nodes_in) == (DecisionKind.REPLACE, ("n2",), ("s1",))


@pytest.mark.parametrize("status", [1, 2])
def test_a_bad_path_stops_at_once(status: int) -> None:
    words = Words("FileNotFoundError", "no such file: '/data'", "/job/t.py:3 FileNotFoundError", own=True)
    dead = [rank(0, status, words=words if status == 1 else None), rank(1, -15)]
    decision = answer([attempt(0, last_step=None, durable_step=None)], detect(see(*dead)))
    assert (decision.cause, decision.rule) == (StopCause.USER, "stop.user")


@pytest.mark.parametrize(
    ("status", "more", "kernel"),
    [
        (1, {"words": Words("ValueError", "x", "/job/t.py:3 ValueError", own=True)}, []),
        (-9, {}, [KernelSeen("n2", "memory.host_oom", "Out of memory: Killed process 9", NOW, Blame.USER)]),
    ],
    ids=["exception", "out of memory"],
)
def test_a_users_error_is_tried_twice_and_no_more(
    status: int, more: dict[str, Any], kernel: list[KernelSeen]
) -> None:
    faults = detect(see(rank(0), rank(1, status, **more), kernel=kernel))
    assert answer([attempt(0)], faults).kind is DecisionKind.RESTART
    assert answer([attempt(0, faults), attempt(1)], faults).rule == "stop.user_repeated"


def test_ranks_in_different_operations_hang_twice_and_then_it_is_the_users_error() -> None:
    limits = Limits()
    limits.begin(0, [0, 1], 0.0)
    for number in (0, 1):
        limits.observe(
            {
                "attempt": 0,
                "rank": number,
                "event": "heartbeat",
                "phase": "step",
                "progress": 1,
                "quiet_seconds": 9999.0,
            },
            1.0,
        )
    stuck = [rank(0, quiet_seconds=9999.0), rank(1, quiet_seconds=9999.0)]
    snapshot = see(*stuck, overdue=limits.overdue(2.0))
    (hang,) = detect(snapshot)
    assert hang.diagnose
    met = waitfor.Diagnosis(waitfor.Kind.MISMATCH, (1,), (), (), (), ("all_reduce against broadcast",))
    told = (hang_explained(hang, met, snapshot),)
    running = attempt(0, ending=None, ended=None)
    assert answer([running], told).kind is DecisionKind.RESTART
    assert answer([attempt(0, told), attempt(1)], told).cause is StopCause.USER
    waited = waitfor.Diagnosis(waitfor.Kind.STOPPED, (1,), (), (), (), ("rank 0 waits for rank 1",))
    assert answer([running], (hang_explained(hang, waited, snapshot),)).nodes_out == ("n2",)


def test_candidates_of_a_guards_stop_are_probed_and_the_named_rank_is_replaced() -> None:
    stopped = [rank(number, 1, exit_reason="guard") for number in (0, 1)]
    open_ = FindingSeen("corruption.persistent", "error", "one of these", candidates=(0, 1))
    named = replace(open_, message="it is this one", candidates=(), ranks=(1,))
    assert answer([attempt(0)], detect(see(*stopped, findings=[open_]))).rule == "probe.candidates"
    assert answer([attempt(0)], detect(see(*stopped, findings=[named]))).nodes_out == ("n2",)


def test_the_jobs_own_stop_is_no_fault_and_stays_stopped() -> None:
    faults = detect(see(rank(0, 143), rank(1, 143), stop_asked=True))
    assert faults == ()
    assert answer([attempt(0, ending=Ending.STOPPED)], faults).cause is StopCause.ASKED
