"""What is seen and what it means; each detector with the case in which it must be silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from recovery.blame import Blame
from recovery.diagnose import waitfor
from recovery.supervise.detect import Reach, detect, hang_explained
from recovery.supervise.limits import Overdue, Silence
from recovery.supervise.model import (
    Fault,
    Proof,
)
from recovery.supervise.snapshot import (
    DiskSeen,
    FindingSeen,
    KernelSeen,
    NodeSeen,
    RankSeen,
    Snapshot,
    finding,
)
from recovery.supervise.words import Words

NOW = 1_700_000_000.0
LOST = Words("RuntimeError", "Connection closed by peer", consequence=True)
BUG = Words("ValueError", "no such token", "/job/train.py:7 ValueError", own=True)


def ranks(**changes: dict[str, Any]) -> list[RankSeen]:
    """Four ranks on n1 and n2, all well; `r1={"status": 1}` changes rank 1."""
    well = {"quiet_seconds": 0.5, "heard": NOW - 1}
    return [
        RankSeen(**{"rank": r, "node": f"n{1 + r // 2}", **well, **changes.get(f"r{r}", {})})
        for r in range(4)
    ]


def dead(status: int = 1, after: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"status": status, "ended": NOW - 100 + after, **more}


def see(seen: list[RankSeen] | None = None, **changes: Any) -> Snapshot:
    nodes = [NodeSeen("n1"), NodeSeen("n2")]
    return Snapshot(**{"now": NOW, "ranks": seen or ranks(), "nodes": nodes, "step": 40, **changes})


def root(snapshot: Snapshot) -> Fault:
    found = detect(snapshot)
    assert found
    assert found[0].ends
    return found[0]


def test_while_all_is_well_nothing_is_found() -> None:
    assert detect(see()) == ()


# --- deaths ----------------------------------------------------------------------------------------------


def test_the_first_to_die_is_the_root_and_the_others_are_its_consequences() -> None:
    seen = ranks(r0=dead(1, 1.2), r1=dead(1, 1.0), r2=dead(-9), r3=dead(-15, 2))
    fault = root(see(seen))
    assert (fault.kind, fault.ranks, fault.suspects) == ("rank.killed", (2,), ("n2",))
    assert (fault.proof, fault.blame, fault.consequences) == (Proof.EXIT, Blame.UNKNOWN, 3)
    assert fault.convicted == ()
    assert fault.evidence[0].text == "status -9 (SIGKILL)"


def test_a_victim_that_is_seen_first_is_not_the_root() -> None:
    seen = ranks(r0=dead(1, 0.0), r1=dead(1, 0.1), r2=dead(-9, 0.3), r3=dead(-15, 0.2))
    assert root(see(seen)).ranks == (2,), "within half a second there is no order"
    told = ranks(r0=dead(1, 0.0, words=LOST), r1=dead(1, 0.1, words=LOST), r2=dead(1, 5, words=BUG))
    assert root(see(told)).ranks == (2,), "who lost a peer is never first"


def test_what_the_supervisor_killed_did_not_die_of_itself() -> None:
    assert detect(see(ranks(r0=dead(-9, killed_by_us=True)))) == ()


def test_a_traceback_in_the_users_code_is_the_users_error_at_that_place() -> None:
    fault = root(see(ranks(r1=dead(1, words=BUG), r0=dead(1, 2, words=LOST))))
    assert (fault.kind, fault.blame, fault.place) == (
        "code.exception",
        Blame.USER,
        "/job/train.py:7 ValueError",
    )
    assert fault.retryable
    assert fault.suspects == ()


def test_an_import_error_of_all_ranks_is_one_fault_that_no_start_survives() -> None:
    words = Words(
        "ModuleNotFoundError", "No module named 'x'", "/job/train.py:1 ModuleNotFoundError", own=True
    )
    fault = root(see(ranks(**{f"r{r}": dead(1, r / 10, words=words) for r in range(4)})))
    assert (fault.kind, fault.ranks, fault.retryable) == ("code.import", (0, 1, 2, 3), False)
    assert fault.consequences == 0


@pytest.mark.parametrize(
    ("status", "kind", "blame", "retryable"),
    [
        (1, "rank.failed", Blame.UNKNOWN, True),
        (2, "configuration.refused", Blame.USER, False),
        (75, "run.locked", Blame.PLATFORM, True),
        (127, "exit.not_found", Blame.USER, False),
        (130, "rank.interrupted", Blame.PLATFORM, True),
        (143, "rank.terminated", Blame.PLATFORM, True),
        (-15, "rank.terminated", Blame.PLATFORM, True),
        (137, "rank.killed", Blame.UNKNOWN, True),
        (-9, "rank.killed", Blame.UNKNOWN, True),
        (139, "rank.segfault", Blame.UNKNOWN, True),
        (-11, "rank.segfault", Blame.UNKNOWN, True),
        (134, "rank.aborted", Blame.UNKNOWN, True),
        (-7, "rank.bus_error", Blame.UNKNOWN, True),
        (255, "exit.connection_or_1", Blame.PLATFORM, True),
        (42, "exit.status_42", Blame.UNKNOWN, True),
    ],
)
def test_an_exit_status_without_words_says_this_much(
    status: int, kind: str, blame: Blame, retryable: bool
) -> None:
    fault = root(see(ranks(r1=dead(status))))
    assert (fault.kind, fault.blame, fault.retryable) == (kind, blame, retryable)


def test_ranks_that_end_as_the_job_was_asked_to_stop_are_no_fault() -> None:
    assert detect(see(ranks(r0=dead(143), r1=dead(1)), stop_asked=True)) == ()


def test_a_kill_with_the_kernels_out_of_memory_line_beside_it_is_the_users_memory() -> None:
    line = KernelSeen(
        "n1", "memory.host_oom", "Out of memory: Killed process 7 (python)", NOW - 110, Blame.USER
    )
    fault = root(see(ranks(r1=dead(137)), kernel=[line]))
    assert (fault.kind, fault.blame, fault.place) == ("memory.host_oom", Blame.USER, "out-of-memory killer")
    assert [each.source for each in fault.evidence] == ["exit", "kernel_log"]


@pytest.mark.parametrize("change", [{"node": "n2"}, {"time": NOW - 3000}, {"kind": "kernel.hung_task"}])
def test_another_nodes_another_times_or_another_line_explains_no_kill(change: dict[str, Any]) -> None:
    line = KernelSeen("n1", "memory.host_oom", "Out of memory", NOW - 100, Blame.USER)
    assert root(see(ranks(r1=dead(137)), kernel=[replace(line, **change)])).kind == "rank.killed"


def test_where_all_only_lost_others_the_rank_that_still_runs_is_suspected() -> None:
    seen = ranks(**{f"r{r}": dead(1, words=LOST) for r in (0, 1, 2)})
    fault = root(see(seen))
    assert (fault.kind, fault.suspects, fault.ranks) == ("rank.lost_peers", ("n2",), ())


def test_a_rank_that_ended_well_too_early_is_named_when_others_needed_it() -> None:
    fault = root(see(ranks(r0=dead(0), r1=dead(1, words=LOST))))
    assert (fault.kind, fault.blame, fault.ranks) == ("rank.left_early", Blame.USER, (0,))
    assert detect(see(ranks(r0=dead(0)))) == ()


# --- nodes -----------------------------------------------------------------------------------------------


def gone(misses: int = 6, seconds: float = 90.0, node: str = "n2") -> NodeSeen:
    return NodeSeen(node, misses, NOW - seconds, "connect: no route to host")


SILENT = {"quiet_seconds": 0.5, "heard": NOW - 91}
WAITING = {"quiet_seconds": 88.0, "heard": NOW - 1}


def test_a_node_that_missed_enough_answers_over_enough_time_is_gone() -> None:
    seen = ranks(r0=WAITING, r1=WAITING, r2=SILENT, r3=SILENT)
    fault = root(see(seen, nodes=[NodeSeen("n1"), gone()]))
    assert (fault.kind, fault.convicted, fault.proof) == ("node.unreachable", ("n2",), Proof.UNREACHABLE)
    assert fault.ranks == (2, 3)
    assert "6 times in a row (limit 5), for 90 s (limit 60 s)" in fault.message


@pytest.mark.parametrize("node", [gone(1, 900.0), gone(4, 90.0), gone(6, 59.0)])
def test_one_miss_or_few_or_many_in_a_short_time_are_not_enough(node: NodeSeen) -> None:
    seen = ranks(r0=WAITING, r1=WAITING, r2=SILENT, r3=SILENT)
    assert detect(see(seen, nodes=[NodeSeen("n1"), node])) == ()


def test_training_that_goes_on_is_not_ended_for_a_node_that_does_not_answer() -> None:
    (fault,) = detect(see(nodes=[NodeSeen("n1"), gone()]))
    assert not fault.ends, "the other ranks get on, which they could not without it"


def test_most_nodes_gone_at_once_are_the_supervisors_own_trouble() -> None:
    (fault,) = detect(see(nodes=[gone(node="n1"), gone()]))
    assert (fault.kind, fault.blame, fault.nodes, fault.ends) == (
        "network.cut_off",
        Blame.PLATFORM,
        (),
        False,
    )
    (late,) = detect(see(nodes=[gone(node="n1", seconds=1900), gone(seconds=1900)]))
    assert late.ends


def test_the_lost_peers_of_a_gone_node_are_not_the_root() -> None:
    seen = ranks(r0=dead(1, words=LOST), r1=dead(1, words=LOST), r2=SILENT, r3=SILENT)
    found = detect(see(seen, nodes=[NodeSeen("n1"), gone()]))
    assert [each.kind for each in found] == ["node.unreachable", "rank.lost_peers"]


def test_reach_never_means_one_miss() -> None:
    with pytest.raises(ValueError, match="one miss is never enough"):
        Reach(misses=1)


def test_a_kernel_log_that_convicts_is_the_root_of_the_death_beside_it() -> None:
    line = KernelSeen(
        "n2", "accelerator.fallen_off_bus", "NVRM: Xid (PCI:0000:3b:00): 79", NOW - 101, convicts=True
    )
    found = detect(see(ranks(r3=dead(-6)), kernel=[line]))
    assert [each.kind for each in found] == ["accelerator.fallen_off_bus", "rank.aborted"]
    assert found[0].convicted == ("n2",)
    (alone,) = detect(see(kernel=[line]))
    assert not alone.ends, "training goes on"
    assert root(see(ranks(r3=dead(-6)), kernel=[replace(line, convicts=False)])).kind == "rank.aborted"


def test_proof_against_a_node_outranks_an_error_in_the_users_code_that_came_first() -> None:
    line = KernelSeen("n2", "accelerator.ecc", "uncorrectable", NOW - 50, convicts=True)
    kinds = [each.kind for each in detect(see(ranks(r3=dead(1, words=BUG)), kernel=[line]))]
    assert kinds == ["accelerator.ecc", "code.exception"]


def test_a_full_disk_explains_a_death_and_ends_nothing_by_itself() -> None:
    disk = DiskSeen("n1", "/checkpoints", 10, 1000)
    found = detect(see(ranks(r0=dead(1)), disks=[disk]))
    assert [each.kind for each in found] == ["storage.full", "rank.failed"]
    assert [each.ends for each in detect(see(disks=[disk]))] == [False]
    assert detect(see(disks=[replace(disk, free_bytes=1000)])) == ()


# --- silence ---------------------------------------------------------------------------------------------


def over(rank: int, silence: Silence = Silence.STEP, seconds: float = 100.0) -> Overdue:
    return Overdue(rank, silence, seconds, 60.0, 12.0)


def test_all_ranks_quiet_is_a_hang_that_needs_a_diagnosis_and_blames_nobody() -> None:
    seen = ranks(**{f"r{r}": {"quiet_seconds": 100.0} for r in range(4)})
    fault = root(see(seen, overdue=[over(r) for r in range(4)]))
    assert (fault.kind, fault.blame, fault.diagnose) == ("hang", Blame.UNKNOWN, True)
    assert (fault.ranks, fault.nodes, fault.suspects) == ((), (), ())
    assert "limit 60.0 s, largest seen 12.0 s" in fault.message


def test_ranks_that_are_almost_as_quiet_do_not_get_on_either() -> None:
    seen = ranks(**{f"r{r}": {"quiet_seconds": 95.0} for r in range(4)})
    assert root(see(seen, overdue=[over(0)])).kind == "hang"


def test_a_quiet_rank_while_others_get_on_is_noted_and_training_left_alone() -> None:
    (fault,) = detect(see(overdue=[over(2)]))
    assert (fault.kind, fault.ends, fault.suspects) == ("hang", False, ("n2",))


def test_one_heart_that_stopped_while_the_others_wait_is_a_frozen_rank() -> None:
    seen = ranks(r0=WAITING, r1=WAITING, r2=WAITING)
    fault = root(see(seen, overdue=[over(3, Silence.HEART), over(0), over(1), over(2)]))
    assert (fault.kind, fault.ranks, fault.suspects) == ("rank.frozen", (3,), ("n2",))
    assert fault.diagnose
    assert fault.convicted == ()


def test_a_heart_that_is_not_heard_while_the_others_get_on_ends_nothing() -> None:
    (fault,) = detect(see(overdue=[over(3, Silence.HEART)]))
    assert not fault.ends


def test_the_silence_of_a_node_that_misses_answers_waits_for_its_verdict() -> None:
    nodes = [NodeSeen("n1"), NodeSeen("n2", 1, NOW - 5)]
    assert detect(see(ranks(r0=WAITING, r1=WAITING), nodes=nodes, overdue=[over(3, Silence.HEART)])) == ()


def test_the_only_ranks_heart_that_stopped_is_found_too() -> None:
    fault = root(Snapshot(NOW, [RankSeen(0, "n1")], overdue=[over(0, Silence.HEART)]))
    assert fault.kind == "rank.frozen"


def test_after_a_death_the_silence_of_the_others_is_no_fault_of_its_own() -> None:
    found = detect(see(ranks(r0=dead(-9)), overdue=[over(1), over(2), over(3)]))
    assert [each.kind for each in found] == ["rank.killed"]


def test_of_a_trainer_without_events_one_rank_that_prints_is_enough() -> None:
    mute = [RankSeen(r, "n1") for r in range(2)]
    (fault,) = detect(Snapshot(NOW, mute, overdue=[over(1, Silence.OUTPUT)]))
    assert not fault.ends
    assert root(Snapshot(NOW, mute, overdue=[over(r, Silence.OUTPUT) for r in range(2)])).kind == "hang"


def explained(kind: waitfor.Kind, culprits: tuple[int, ...], suspects: tuple[int, ...] = ()) -> Fault:
    seen = see(
        ranks(**{f"r{r}": {"quiet_seconds": 100.0} for r in range(4)}), overdue=[over(r) for r in range(4)]
    )
    found = waitfor.Diagnosis(kind, culprits, suspects, (), (), ("ranks 0-2 in all_reduce #7, for rank 3",))
    return hang_explained(root(seen), found, seen)


def test_the_rank_that_all_wait_for_is_named_with_its_node() -> None:
    fault = explained(waitfor.Kind.STOPPED, (3,))
    assert (fault.kind, fault.convicted, fault.proof) == ("hang.stopped", ("n2",), Proof.WAIT_FOR)
    assert "all_reduce #7" in fault.message
    assert not fault.diagnose


def test_culprits_on_every_node_convict_none() -> None:
    fault = explained(waitfor.Kind.STOPPED, (0, 3))
    assert (fault.convicted, fault.suspects) == ((), ("n1", "n2"))


def test_ranks_that_met_in_different_operations_are_the_programs_doing() -> None:
    fault = explained(waitfor.Kind.MISMATCH, (3,))
    assert (fault.blame, fault.convicted, fault.place) == (Blame.USER, (), "hang.mismatch")


def test_a_hang_of_all_together_leaves_suspects_at_most() -> None:
    fault = explained(waitfor.Kind.TOGETHER, (), (2, 3))
    assert (fault.kind, fault.convicted, fault.suspects) == ("hang", (), ("n2",))


# --- findings --------------------------------------------------------------------------------------------


def found(kind: str, severity: str = "error", **changes: Any) -> FindingSeen:
    return FindingSeen(
        **{"kind": kind, "severity": severity, "message": "seen", "time": NOW - 200, **changes}
    )


STOPPED = ranks(
    **{f"r{r}": dead(1, exit_reason="guard", exit_message="stopped by a guard") for r in range(4)}
)


def test_a_guards_stop_for_persistent_corruption_convicts_the_named_ranks_node() -> None:
    (fault,) = detect(see(STOPPED, findings=[found("corruption.persistent", ranks=(3,))]))
    assert (fault.kind, fault.convicted, fault.blame) == ("corruption.persistent", ("n2",), Blame.HARDWARE)
    assert fault.consequences == 4


def test_candidates_of_a_guard_are_suspects_only() -> None:
    fault = root(see(STOPPED, findings=[found("corruption.persistent", candidates=(0, 3))]))
    assert (fault.convicted, fault.suspects, fault.proof) == ((), ("n1", "n2"), Proof.GUARD)


def test_who_made_a_number_that_is_none_is_suspected_not_convicted() -> None:
    fault = root(see(STOPPED, findings=[found("finite.gradient", ranks=(3,))]))
    assert (fault.kind, fault.convicted, fault.suspects) == ("finite.gradient", (), ("n2",))


def test_a_guards_stop_for_the_models_own_doing_is_the_users() -> None:
    assert root(see(STOPPED, findings=[found("collapse.valley")])).blame is Blame.USER


def test_a_guards_stop_without_a_known_finding_is_still_a_fault() -> None:
    fault = root(see(STOPPED, findings=[found("novel.kind")]))
    assert (fault.kind, fault.message) == ("guard.stop", "stopped by a guard")


def test_a_checkpoint_that_could_not_be_saved_for_too_long_is_the_platforms() -> None:
    assert root(see(STOPPED, findings=[found("checkpoint.gave_up")])).blame is Blame.PLATFORM


@pytest.mark.parametrize(
    "kind", ["slow_rank", "jitter", "corruption.transient", "checkpoint.failed", "finite.loss"]
)
def test_a_finding_while_training_goes_on_is_noted_and_ends_nothing(kind: str) -> None:
    (fault,) = detect(see(findings=[found(kind, "warning", ranks=(3,))]))
    assert not fault.ends


def test_a_slow_rank_is_proven_slow_until_it_is_taken_back() -> None:
    slow = found("slow_rank", "warning", ranks=(3,))
    (fault,) = detect(see(findings=[slow]))
    assert fault.convicted == ("n2",)
    assert detect(see(findings=[slow, found("slow_rank.over", "info", ranks=(3,))])) == ()
    assert len(detect(see(findings=[slow, found("slow_rank.over", "info", ranks=(1,))]))) == 1


def test_proven_corruption_is_the_root_when_the_attempt_died_of_something_else() -> None:
    found_it = [found("corruption.persistent", ranks=(3,))]
    kinds = [each.kind for each in detect(see(ranks(r0=dead(-9)), findings=found_it))]
    assert kinds == ["corruption.persistent", "rank.killed"]


def test_findings_that_concern_no_node_and_no_decision_are_passed_over() -> None:
    assert detect(see(findings=[found("events.lost"), found("noise.page_cache_dropped", "info")])) == ()


def test_a_finding_is_read_from_the_event_stream() -> None:
    event = {
        "v": 1,
        "t": 12.5,
        "event": "finding",
        "kind": "corruption.persistent",
        "severity": "error",
        "step": 7,
        "message": "ranks 0, 2 disagree",
        "ranks": [],
        "where": [],
        "evidence": {"candidates": [0, 2]},
    }
    seen = FindingSeen("corruption.persistent", "error", "ranks 0, 2 disagree", 7, (), (0, 2), 12.5)
    assert finding(event) == seen
    assert finding({**event, "event": "step"}) is None
    odd = finding({**event, "kind": "slow_rank", "step": -1, "ranks": ["1", True, 2], "evidence": None})
    assert odd is not None
    assert (odd.step, odd.ranks, odd.candidates) == (None, (2,), ())
