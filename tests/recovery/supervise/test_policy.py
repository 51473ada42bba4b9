"""What is decided, rule by rule; each with the case in which the rule must not fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from probes.model import Verdict
from recovery.blame import Blame
from recovery.supervise.model import (
    Attempt,
    Budget,
    CheckpointView,
    Decision,
    DecisionKind,
    Ending,
    Evidence,
    Fault,
    FleetView,
    Out,
    Probed,
    Proof,
    StopCause,
)
from recovery.supervise.policy import decide
from recovery.supervise.settings import Probing, Settings
from tests.recovery.supervise.building import (
    BAD_NODE,
    BUG,
    HOUR,
    KILLED,
    MISSING,
    PORT,
    attempt,
    fault,
    fleet,
    past,
)

QUIET = Settings(probing=Probing.NEVER)


def ask(
    history: Sequence[Attempt],
    *faults: Fault,
    budget: Budget | None = None,
    nodes: FleetView | None = None,
    checkpoints: Sequence[CheckpointView] = (),
    settings: Settings | None = None,
    after: float = 0.0,
) -> Decision:
    """Right when the last attempt ended, or `after` seconds later."""
    now = (history[-1].ended or history[-1].started) + after if history else 0.0
    return decide(
        history,
        faults,
        budget or Budget(attempts=len(history)),
        nodes or fleet(),
        checkpoints,
        settings or Settings(),
        now,
    )


def probed(node: str, verdict: Verdict = Verdict.HEALTHY, **changes: Any) -> Probed:
    return Probed(node, verdict, **changes)


ALL_WELL = (probed("n1"), probed("n2"))


def test_a_job_whose_ranks_all_ended_with_0_is_done() -> None:
    decision = ask([attempt(ending=Ending.FINISHED, last_step=10)])
    assert (decision.kind, decision.cause) == (DecisionKind.STOP, StopCause.DONE)


def test_a_job_that_was_asked_to_stop_is_not_started_again_and_has_no_fault() -> None:
    decision = ask([attempt(ending=Ending.STOPPED, last_step=10)])
    assert (decision.kind, decision.cause) == (DecisionKind.STOP, StopCause.ASKED)


def test_a_termination_that_nobody_asked_for_restarts_the_job_in_place() -> None:
    decision = ask(past(10), fault("rank.terminated", Blame.PLATFORM, proof=Proof.EXIT))
    assert (decision.kind, decision.rule) == (DecisionKind.RESTART, "restart.in_place")
    assert not decision.nodes_out


def test_what_does_not_end_training_lets_it_run() -> None:
    running = attempt(ending=None, ended=None, last_step=5)
    slow = fault("slow_rank", Blame.HARDWARE, ends=False, nodes=("n2",), proof=Proof.GUARD)
    decision = ask([running], slow, nodes=fleet(spares=("s1",)))
    assert decision.kind is DecisionKind.CONTINUE
    assert "slow_rank" in decision.reason


def test_a_hang_of_a_running_attempt_is_not_left_alone() -> None:
    running = attempt(ending=None, ended=None, last_step=5)
    assert ask([running], fault("hang")).kind is DecisionKind.PROBE


def test_an_import_error_stops_at_once() -> None:
    decision = ask(past(None), MISSING)
    assert (decision.cause, decision.rule) == (StopCause.USER, "stop.user")
    assert "code.import" in decision.reason


def test_an_import_error_after_training_went_well_is_probed_and_tried_once_more() -> None:
    """Then the program is not what changed: a node was swapped, a disk unmounted."""
    history = past(100, None)
    assert ask(history, MISSING).rule == "probe.unattributed"
    assert ask(history, MISSING, nodes=fleet(probed=ALL_WELL)).kind is DecisionKind.RESTART
    again = [history[0], replace(history[1], faults=(MISSING,)), attempt(2)]
    assert ask(again, MISSING, nodes=fleet(probed=ALL_WELL)).rule == "stop.user_repeated"


def test_an_import_error_on_a_node_that_is_proven_bad_is_that_nodes_doing() -> None:
    decision = ask(past(None), MISSING, BAD_NODE, nodes=fleet(spares=("s1",)))
    assert (decision.kind, decision.nodes_out) == (DecisionKind.REPLACE, ("n2",))


def test_a_users_error_is_tried_once_more_and_stops_when_it_comes_back_at_the_same_place() -> None:
    first = ask(past(7), BUG)
    assert first.kind is DecisionKind.RESTART
    second = ask([attempt(0, last_step=7, durable_step=5, faults=(BUG,)), attempt(1, last_step=7)], BUG)
    assert (second.cause, second.rule) == (StopCause.USER, "stop.user_repeated")
    assert "train.py:7 ValueError" in second.reason
    assert len(second.tried) == 2


@pytest.mark.parametrize(
    "second",
    [
        replace(BUG, place="train.py:8 ValueError"),
        replace(BUG, kind="memory.device_oom"),
        replace(BUG, blame=Blame.PLATFORM),
    ],
    ids=["another place", "another kind", "another's blame"],
)
def test_another_error_than_before_gets_a_try_of_its_own(second: Fault) -> None:
    history = [attempt(0, last_step=7, faults=(BUG,)), attempt(1, last_step=8)]
    assert ask(history, second).kind is DecisionKind.RESTART


def test_without_a_known_place_the_same_kind_at_another_step_is_not_the_same_error() -> None:
    nowhere = replace(BUG, place=None, step=7)
    history = [attempt(0, last_step=7, faults=(nowhere,)), attempt(1, last_step=7)]
    assert ask(history, replace(nowhere, step=9)).kind is DecisionKind.RESTART
    assert ask(history, nowhere).rule == "stop.user_repeated"


def test_the_same_error_after_a_new_checkpoint_is_another_event() -> None:
    history = [
        attempt(0, last_step=70, durable_step=50, faults=(BUG,)),
        attempt(1, last_step=7000, durable_step=6990, resumed_from=50),
    ]
    assert ask(history, BUG).kind is DecisionKind.RESTART


def test_without_retries_a_users_first_error_stops() -> None:
    assert ask(past(7), BUG, settings=Settings(user_retries=0)).cause is StopCause.USER
    assert ask(past(7), PORT, settings=Settings(user_retries=0)).kind is DecisionKind.RESTART


def test_a_proven_node_is_replaced_by_the_first_validated_spare() -> None:
    decision = ask(past(7), BAD_NODE, nodes=fleet(spares=("s1", "s2")))
    assert (decision.kind, decision.rule) == (DecisionKind.REPLACE, "replace.proven")
    assert (decision.nodes_out, decision.nodes_in) == (("n2",), ("s1",))
    assert "kernel_log" in decision.reason


@pytest.mark.parametrize("proof", [Proof.NONE, Proof.EXIT])
def test_no_proof_no_eviction(proof: Proof) -> None:
    named = fault("rank.killed", Blame.HARDWARE, nodes=("n2",), suspects=("n2",), proof=proof)
    decision = ask(past(7), named, nodes=fleet(spares=("s1",), probed=ALL_WELL))
    assert (decision.kind, decision.nodes_out) == (DecisionKind.RESTART, ())


def test_a_users_error_evicts_no_node_even_where_the_kernel_log_names_one() -> None:
    oom = fault("memory.host_oom", Blame.USER, nodes=("n2",), proof=Proof.KERNEL_LOG)
    assert ask(past(7), oom, nodes=fleet(spares=("s1",))).nodes_out == ()


def test_persistent_corruption_replaces_the_named_ranks_node() -> None:
    named = fault("corruption.persistent", Blame.HARDWARE, ranks=(1,), nodes=("n2",), proof=Proof.GUARD)
    assert ask(past(7), named, nodes=fleet(spares=("s1",))).nodes_out == ("n2",)


def test_several_candidates_of_a_guard_are_probed_and_nobody_else() -> None:
    nodes = ("n1", "n2", "n3")
    open_ = fault("corruption.persistent", Blame.HARDWARE, suspects=("n1", "n3"), proof=Proof.GUARD)
    view = fleet(nodes=nodes, needed=3, spares=("s1",))
    decision = ask([attempt(nodes=nodes, last_step=7)], open_, nodes=view)
    assert (decision.kind, decision.rule) == (DecisionKind.PROBE, "probe.candidates")
    assert decision.probe_nodes == ("n1", "n3")
    found = replace(view, probed=(probed("n1"), probed("n3", Verdict.UNHEALTHY)))
    assert ask([attempt(nodes=nodes, last_step=7)], open_, nodes=found).nodes_out == ("n3",)


def test_what_nothing_explains_gets_all_nodes_probed_with_the_suspect_first() -> None:
    decision = ask(past(7), KILLED)
    assert (decision.kind, decision.probe_nodes) == (DecisionKind.PROBE, ("n2", "n1"))
    assert decision.thorough == ()


def test_an_end_without_any_known_fault_is_probed_too() -> None:
    assert ask(past(7)).probe_nodes == ("n1", "n2")


def test_clean_probes_lead_to_a_restart_in_place() -> None:
    decision = ask(past(7), KILLED, nodes=fleet(spares=("s1",), probed=ALL_WELL))
    assert (decision.kind, decision.nodes_out) == (DecisionKind.RESTART, ())
    assert "probes found nothing on 2 nodes" in decision.reason


def test_a_probe_that_finds_a_node_unhealthy_replaces_it() -> None:
    view = fleet(spares=("s1",), probed=(probed("n1", Verdict.UNHEALTHY), probed("n2")))
    decision = ask(past(7), KILLED, nodes=view)
    assert (decision.nodes_out, decision.nodes_in) == (("n1",), ("s1",))


def test_a_probe_without_an_answer_is_repeated_and_then_proves_nothing() -> None:
    silent = fleet(spares=("s1",), probed=(probed("n1"), probed("n2", Verdict.UNKNOWN)))
    decision = ask(past(7), KILLED, nodes=silent)
    assert (decision.kind, decision.probe_nodes) == (DecisionKind.PROBE, ("n2",))
    tired = replace(silent, probed=(probed("n1"), probed("n2", Verdict.UNKNOWN, tries=2)))
    decision = ask(past(7), KILLED, nodes=tired)
    assert (decision.kind, decision.nodes_out) == (DecisionKind.RESTART, ())
    assert "no probe of n2 gave an answer" in decision.reason


def test_a_node_that_is_suspected_twice_is_probed_comprehensively_and_still_not_evicted() -> None:
    history = [attempt(0, last_step=7, faults=(KILLED,)), attempt(1, last_step=9)]
    assert ask(history, KILLED).thorough == ("n2",)
    clean = fleet(spares=("s1",), probed=(probed("n1"), probed("n2", thorough=True)))
    assert ask(history, KILLED, nodes=clean).nodes_out == ()
    other = [attempt(0, last_step=7, faults=(replace(KILLED, suspects=("n1",)),)), attempt(1, last_step=9)]
    assert ask(other, KILLED).thorough == ()


def test_probing_may_begin_with_the_second_fault_or_never() -> None:
    seldom = Settings(probing=Probing.REPEAT)
    assert ask(past(7), KILLED, settings=seldom).kind is DecisionKind.RESTART
    again = [attempt(0, last_step=7, faults=(KILLED,)), attempt(1, last_step=9)]
    assert ask(again, KILLED, settings=seldom).kind is DecisionKind.PROBE
    assert ask(again, KILLED, settings=QUIET).kind is DecisionKind.RESTART


def test_what_the_platform_did_is_not_probed_for() -> None:
    assert ask(past(7), PORT).kind is DecisionKind.RESTART


def test_what_a_hang_waits_on_is_replaced_where_a_spare_is_at_hand() -> None:
    hang = fault("hang", nodes=("n2",), ranks=(1,), proof=Proof.WAIT_FOR)
    assert ask(past(7), hang, nodes=fleet(spares=("s1",))).nodes_out == ("n2",)


def test_what_a_hang_waits_on_is_probed_and_stays_if_healthy_where_no_spare_is() -> None:
    hang = fault("hang", nodes=("n2",), ranks=(1,), proof=Proof.WAIT_FOR)
    first = ask(past(7), hang)
    assert (first.kind, first.rule, first.probe_nodes) == (DecisionKind.PROBE, "probe.waited_on", ("n2",))
    second = ask(past(7), hang, nodes=fleet(probed=(probed("n2"),)))
    assert second.kind is DecisionKind.RESTART
    assert "n2 stays" in second.reason
    ill = ask(past(7), hang, nodes=fleet(probed=(probed("n2", Verdict.UNHEALTHY),)))
    assert ill.kind is DecisionKind.WAIT


def test_a_slow_node_is_swapped_at_the_next_restart_if_a_spare_is_left_over() -> None:
    slow = fault("slow_rank", Blame.HARDWARE, ends=False, nodes=("n1",), proof=Proof.GUARD)
    assert ask(past(7), PORT, slow, nodes=fleet(spares=("s1",))).nodes_out == ("n1",)
    assert ask(past(7), PORT, slow).kind is DecisionKind.RESTART
    both = ask(past(7), BAD_NODE, slow, nodes=fleet(spares=("s1",)))
    assert (both.nodes_out, both.nodes_in) == (("n2",), ("s1",))


def test_spares_without_a_verdict_are_probed_before_one_is_taken() -> None:
    view = fleet(unvalidated=("u1", "u2"))
    decision = ask(past(7), BAD_NODE, nodes=view)
    assert (decision.rule, decision.probe_nodes) == ("probe.spares", ("u1", "u2"))
    passed = replace(view, probed=(probed("u1", Verdict.UNHEALTHY), probed("u2")))
    assert ask(past(7), BAD_NODE, nodes=passed).nodes_in == ("u2",)
    failed = replace(view, probed=(probed("u1", Verdict.UNHEALTHY), probed("u2", Verdict.UNKNOWN, tries=2)))
    assert ask(past(7), BAD_NODE, nodes=failed).kind is DecisionKind.WAIT


def test_a_validated_spare_is_taken_before_others_are_probed() -> None:
    assert ask(past(7), BAD_NODE, nodes=fleet(spares=("s1",), unvalidated=("u1",))).nodes_in == ("s1",)


def test_a_node_that_is_out_is_no_spare() -> None:
    view = fleet(spares=("s1", "s2"), out=(Out("s1", "cordoned by ops"),))
    assert ask(past(7), BAD_NODE, nodes=view).nodes_in == ("s2",)


def test_a_node_of_the_job_itself_is_no_spare() -> None:
    assert ask(past(7), BAD_NODE, nodes=fleet(spares=("n1", "n2", "s1"))).nodes_in == ("s1",)


def test_a_spare_that_a_probe_just_found_unhealthy_is_not_taken() -> None:
    view = fleet(spares=("s1", "s2"), probed=(probed("s1", Verdict.UNHEALTHY),))
    assert ask(past(7), BAD_NODE, nodes=view).nodes_in == ("s2",)


def test_a_node_of_the_job_that_was_taken_out_is_replaced_and_the_reason_says_by_what() -> None:
    view = fleet(spares=("s1",), out=(Out("n1", "cordoned by ops"),))
    decision = ask(past(7), PORT, nodes=view)
    assert decision.nodes_out == ("n1",)
    assert "cordoned by ops" in decision.reason


def test_without_a_spare_it_waits_and_then_stops() -> None:
    first = ask(past(7), BAD_NODE)
    assert (first.kind, first.wait_seconds) == (DecisionKind.WAIT, 30.0)
    began = past(7)[-1].ended
    late = ask(past(7), BAD_NODE, budget=Budget(1, 0.0, began), after=HOUR - 10)
    assert late.wait_seconds == pytest.approx(10)
    over = ask(past(7), BAD_NODE, budget=Budget(1, 0.0, began), after=HOUR)
    assert (over.cause, over.rule) == (StopCause.PLATFORM, "stop.no_nodes")
    assert "does not run on fewer nodes" in over.reason


def test_it_does_not_wait_where_it_must_not_or_need_not() -> None:
    assert ask(past(7), BAD_NODE, settings=Settings(wait_for_nodes_seconds=0)).rule == "stop.no_nodes"
    came = fleet(spares=("s1",))
    waited = Budget(1, 0.0, past(7)[-1].ended)
    assert ask(past(7), BAD_NODE, nodes=came, budget=waited, after=2 * HOUR).kind is DecisionKind.REPLACE


def test_a_lost_place_is_filled_without_anybody_being_put_out() -> None:
    decision = ask(past(7), PORT, nodes=fleet(nodes=("n1",), spares=("s1",)))
    assert (decision.rule, decision.nodes_out, decision.nodes_in) == ("replace.missing", (), ("s1",))


def test_the_first_start_needs_no_history() -> None:
    assert ask([]).rule == "restart.first"
    assert ask([], nodes=fleet(nodes=("n1",))).kind is DecisionKind.WAIT


def test_it_goes_on_from_the_newest_good_checkpoint() -> None:
    views = [CheckpointView(10), CheckpointView(30), CheckpointView(20)]
    decision = ask(past(33), PORT, checkpoints=views)
    assert (decision.kind, decision.checkpoint) == (DecisionKind.RESTART, 30)


def test_a_checkpoint_that_is_not_good_is_passed_over() -> None:
    decision = ask(past(33), PORT, checkpoints=[CheckpointView(20), CheckpointView(30, good=False)])
    assert (decision.kind, decision.checkpoint, decision.quarantine) == (DecisionKind.ROLL_BACK, 20, ())


def test_a_checkpoint_that_failed_twice_is_set_aside_for_an_older_one() -> None:
    views = [CheckpointView(20), CheckpointView(30, failures=2)]
    decision = ask(past(33), PORT, checkpoints=views)
    assert (decision.kind, decision.checkpoint, decision.quarantine) == (DecisionKind.ROLL_BACK, 20, (30,))
    once = ask(past(33), PORT, checkpoints=[CheckpointView(20), CheckpointView(30, failures=1)])
    assert (once.checkpoint, once.quarantine) == (30, ())


def test_two_attempts_without_a_new_step_speak_against_their_checkpoint() -> None:
    nan = fault("finite.gradient")
    history = [attempt(0, last_step=33, durable_step=30, faults=(nan,))]
    history += [attempt(n, last_step=31, resumed_from=30, faults=(nan,)) for n in (1, 2)]
    views = [CheckpointView(20), CheckpointView(30)]
    assert ask(history[:2], nan, checkpoints=views, settings=QUIET).checkpoint == 30
    decision = ask(history, nan, checkpoints=views, settings=QUIET)
    assert (decision.checkpoint, decision.quarantine) == (20, (30,))


def test_what_a_node_or_the_platform_did_does_not_speak_against_a_checkpoint() -> None:
    views = [CheckpointView(20), CheckpointView(30)]
    for other in (PORT, BAD_NODE):
        history = [attempt(0, last_step=33, durable_step=30, faults=(other,))]
        history += [attempt(n, resumed_from=30, faults=(other,)) for n in (1, 2)]
        assert ask(history, other, checkpoints=views, nodes=fleet(spares=("s1",))).checkpoint == 30


def test_without_a_usable_checkpoint_it_stops_rather_than_lose_everything() -> None:
    views = [CheckpointView(30, good=False), CheckpointView(20, failures=2)]
    decision = ask(past(33), PORT, checkpoints=views)
    assert (decision.cause, decision.rule) == (StopCause.PLATFORM, "stop.no_checkpoint_left")
    over = ask(past(33), PORT, checkpoints=views, settings=Settings(start_over=True))
    assert (over.kind, over.checkpoint) == (DecisionKind.ROLL_BACK, None)
    assert ask(past(33), PORT).kind is DecisionKind.RESTART, "none was saved, so none is lost"


def test_a_replacement_may_come_with_an_older_checkpoint() -> None:
    views = [CheckpointView(20), CheckpointView(30, good=False)]
    decision = ask(past(33), BAD_NODE, nodes=fleet(spares=("s1",)), checkpoints=views)
    assert (decision.kind, decision.checkpoint) == (DecisionKind.REPLACE, 20)


def test_three_attempts_in_a_row_without_a_new_step_stop_the_job_and_say_what_was_tried() -> None:
    history = [attempt(n, last_step=step, faults=(PORT,)) for n, step in enumerate([9, 5, None, 9])]
    history[2] = replace(history[2], nodes=("n1", "s1"))
    decision = ask(history, PORT)
    assert (decision.cause, decision.rule) == (StopCause.NO_PROGRESS, "stop.no_progress")
    assert len(decision.tried) == 3
    assert "attempt 2 from the beginning with n2 replaced by s1: reached no step" in decision.tried[1]


def test_two_attempts_without_a_new_step_or_three_with_one_between_go_on() -> None:
    assert ask(past(9, 5, None), PORT).kind is DecisionKind.RESTART
    assert ask(past(9, 5, None, 10), PORT).kind is DecisionKind.RESTART


def test_a_trainer_that_tells_no_steps_is_judged_by_how_long_it_ran() -> None:
    silent = {"tells_steps": False}
    assert ask(past(None, None, None, **silent), PORT).kind is DecisionKind.RESTART, "half an hour each"
    brief = [attempt(n, tells_steps=False, ended=attempt(n).started + 60) for n in range(3)]
    assert ask(brief, PORT).cause is StopCause.NO_PROGRESS


def test_a_job_that_saves_nothing_in_ten_attempts_stops() -> None:
    history = past(*range(1, 11))
    assert ask(history, PORT).rule == "stop.no_checkpoint"
    history[5] = replace(history[5], durable_step=4)
    assert ask(history, PORT).kind is DecisionKind.RESTART


def test_attempts_are_a_budget() -> None:
    limit = Settings(max_attempts=4)
    assert ask(past(1, 2, 3, 4), PORT, settings=limit).rule == "stop.attempts"
    assert ask(past(1, 2, 3), PORT, settings=limit).kind is DecisionKind.RESTART
    told = ask(past(1), PORT, settings=limit, budget=Budget(attempts=4))
    assert told.cause is StopCause.BUDGET, "attempts that a shortened history has lost count too"


def test_attempts_within_a_window_are_a_budget() -> None:
    limit = Settings(attempts_per_window=3, window_seconds=2.6 * HOUR)
    assert ask(past(1, 2, 3), PORT, settings=limit).rule == "stop.attempts_in_window"
    assert ask(past(1, 2, 3), PORT, settings=limit, after=HOUR).kind is DecisionKind.RESTART


def test_lost_time_is_a_budget() -> None:
    limit = Settings(max_lost_seconds=100)
    assert ask(past(9), PORT, settings=limit, budget=Budget(1, 100.0)).rule == "stop.lost_time"
    assert ask(past(9), PORT, settings=limit, budget=Budget(1, 99.0)).kind is DecisionKind.RESTART
    short = ask(past(9, 1, 2), PORT, settings=limit, budget=Budget(3, 99.0))
    assert short.wait_seconds == 1.0, "a back-off does not overdraw it"


def test_the_back_off_grows_without_progress_is_capped_and_begins_anew_after_progress() -> None:
    many = Settings(no_progress_attempts=9, backoff_cap_seconds=40)
    waits = [ask(past(9, *[1] * n), PORT, settings=many).wait_seconds for n in range(5)]
    assert waits == [0, 5, 15, 40, 40]
    assert ask(past(9, 1, 1, 10), PORT, settings=many).wait_seconds == 0


def test_time_that_went_by_counts_towards_the_back_off_and_a_clock_set_back_does_not_lengthen_it() -> None:
    assert ask(past(9, 1), PORT, after=3).wait_seconds == 2
    assert ask(past(9, 1), PORT, after=100).wait_seconds == 0
    assert ask(past(9, 1), PORT, after=-1000).wait_seconds == 5


def test_a_replacement_does_not_back_off_as_the_cause_is_gone() -> None:
    assert ask(past(9, 1), BAD_NODE, nodes=fleet(spares=("s1",))).wait_seconds == 0


def test_a_decision_carries_the_evidence_of_its_faults_and_probes_once() -> None:
    seen, measured = Evidence("kernel_log", "Xid 79", node="n2"), Evidence("probe", "2 of 8 devices")
    broken = replace(BAD_NODE, evidence=(seen, seen))
    view = fleet(spares=("s1",), probed=(probed("n1", evidence=(measured,)),))
    assert ask(past(9), broken, nodes=view).evidence == (seen, measured)


@pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"node_poll_seconds": 0}, {"max_lost_seconds": -1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
