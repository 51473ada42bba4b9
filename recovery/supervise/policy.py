"""What to do about what broke: a pure function of the job's past and of what there is to go on with.

The rules stand in `RULES`, in order; the first that has an answer decides. No clock, network or file here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from probes.model import Verdict
from recovery.blame import Blame
from recovery.supervise import past
from recovery.supervise.model import (
    Attempt,
    Budget,
    CheckpointView,
    Decision,
    DecisionKind,
    Ending,
    Fault,
    FleetView,
    Proof,
    StopCause,
)
from recovery.supervise.settings import Probing, Settings
from recovery.supervise.situation import Situation


def decide(
    history: Sequence[Attempt],
    faults: Sequence[Fault],
    budget: Budget,
    fleet: FleetView,
    checkpoints: Sequence[CheckpointView],
    settings: Settings,
    now: float,
) -> Decision:
    """What to do now, with the reason.

    `history`: every attempt, oldest first, the one that ended (or hangs) last. `faults`: what is known of
    that one, root first; they count instead of its own. After a PROBE, call again with the results in
    `fleet.probed`: one entry for each node that was asked for, `Verdict.UNKNOWN` where none answered. After a
    WAIT, call again with `budget.waiting_since`. `now`: seconds since 1970.
    """
    attempts = list(history)
    if attempts:
        attempts[-1] = replace(attempts[-1], faults=tuple(faults))
    case = Situation(attempts, tuple(faults), budget, fleet, tuple(checkpoints), settings, now)
    for rule in RULES:
        decision = rule(case)
        if decision is not None:
            return replace(decision, evidence=case.evidence)
    raise AssertionError("the last rule always decides")


def _finished(case: Situation) -> Decision | None:
    last = case.attempts[-1] if case.attempts else None
    if last is None or last.ending not in (Ending.FINISHED, Ending.STOPPED):
        return None
    if last.ending is Ending.FINISHED:
        reason = f"attempt {last.number} finished: every rank ended with status 0"
        return _stop(case, StopCause.DONE, "stop.done", reason)
    return _stop(
        case, StopCause.ASKED, "stop.asked", f"attempt {last.number} ended as the job was asked to stop"
    )


def _goes_on(case: Situation) -> Decision | None:
    if not case.attempts or case.attempts[-1].ending is not None or case.grave:
        return None
    noted = "; ".join(f"{fault.kind}: {fault.message}" for fault in case.faults) or "nothing found"
    reason = f"attempt {case.attempts[-1].number} runs and nothing found ends it: {noted}"
    return Decision(DecisionKind.CONTINUE, "continue", reason)


def _users_error(case: Situation) -> Decision | None:
    fault = case.root
    if fault is None or fault.blame is not Blame.USER or case.guilty:
        return None
    if not fault.retryable and not past.stepped(case.attempts, case.settings.silent_progress_seconds):
        reason = f"{case.what()}; that is the user's to mend, and another start can only end the same way"
        return _stop(case, StopCause.USER, "stop.user", reason)
    times = past.repetitions(case.attempts, case.settings.silent_progress_seconds)
    if times < case.settings.user_retries:
        return None
    where = fault.place or f"step {fault.step}"
    reason = (
        f"{case.what()}; the same user's error at the same place ({where}) as in {times} attempt(s) before, "
        f"without a new checkpoint between (retries: {case.settings.user_retries})"
    )
    return _stop(case, StopCause.USER, "stop.user_repeated", reason, times + 1)


def _spent(case: Situation) -> Decision | None:
    settings = case.settings
    used = max(case.budget.attempts, len(case.attempts))
    if used >= settings.max_attempts:
        reason = f"{used} of {settings.max_attempts} attempts are used; the last, {case.what()}"
        return _stop(case, StopCause.BUDGET, "stop.attempts", reason, 5)
    recent = sum(each.started > case.now - settings.window_seconds for each in case.attempts)
    if recent >= settings.attempts_per_window:
        reason = (
            f"{recent} attempts were started within {settings.window_seconds:g} s "
            f"(limit {settings.attempts_per_window}); the last, {case.what()}"
        )
        return _stop(case, StopCause.BUDGET, "stop.attempts_in_window", reason, 5)
    if case.lost_left <= 0:
        reason = (
            f"{case.budget.lost_seconds:g} s are lost (limit {settings.max_lost_seconds:g}); "
            f"the last, {case.what()}"
        )
        return _stop(case, StopCause.BUDGET, "stop.lost_time", reason, 5)
    return None


def _no_progress(case: Situation) -> Decision | None:
    settings = case.settings
    if case.without_step >= settings.no_progress_attempts:
        reason = (
            f"no new step in {case.without_step} attempts in a row (limit {settings.no_progress_attempts}); "
            f"the last, {case.what()}"
        )
        return _stop(case, StopCause.NO_PROGRESS, "stop.no_progress", reason, case.without_step)
    unsaved = past.trailing(past.new_checkpoints(case.attempts, settings.silent_progress_seconds))
    if unsaved >= settings.no_checkpoint_attempts:
        reason = (
            f"no new checkpoint in {unsaved} attempts in a row (limit {settings.no_checkpoint_attempts}): "
            f"what is done is lost again; the last, {case.what()}"
        )
        return _stop(case, StopCause.NO_PROGRESS, "stop.no_checkpoint", reason, unsaved)
    return None


def _probe(case: Situation) -> Decision | None:
    """Nodes of a fault that nothing explains, before it may happen to the next attempt."""
    settings = case.settings
    if not case.attempts or settings.probing is Probing.NEVER:
        return None
    if case.guilty or any(fault.convicted for fault in case.grave):
        return None
    # What follows the root needs no explanation of its own.
    if case.root is not None and not _unexplained(case.root, case):
        return None
    suspected = past.suspicions(case.attempts)
    if case.root is not None and case.root.proof is Proof.GUARD and case.root.suspects:
        wanted = case.root.suspects
        rule, why = "probe.candidates", "a guard says that one of these is to blame, not which"
    else:
        if settings.probing is Probing.REPEAT and not _seen_before(case):
            return None
        wanted = case.nodes
        rule, why = "probe.unattributed", "nothing shows who is to blame, so all nodes are probed"
    suspects = {node for fault in case.grave for node in fault.suspects}
    open_ = [
        n for n in dict.fromkeys(wanted) if n in case.nodes and n not in case.bad and not case.answered(n)
    ]
    open_.sort(key=lambda node: (node not in suspects, -suspected[node]))
    if not open_:
        return None
    thorough = tuple(node for node in open_ if suspected[node] >= settings.thorough_suspicions)
    reason = f"{case.what()}; {why}: {', '.join(open_)}"
    if thorough:
        counts = ", ".join(f"{node} ({suspected[node]})" for node in thorough)
        limit = settings.thorough_suspicions
        reason += f"; comprehensively those suspected in {limit} attempts or more: {counts}"
    return Decision(DecisionKind.PROBE, rule, reason, probe_nodes=tuple(open_), thorough=thorough)


def _nodes_wanting(case: Situation) -> Decision | None:
    """Before a start without enough good nodes."""
    if case.short <= 0:
        return _ask_doubtful(case)
    settings = case.settings
    why = "; ".join(f"{node}: {cause}" for node, cause in case.bad.items()) or "nodes are missing"
    have = (
        f"{case.fleet.needed} nodes are needed, {len(case.nodes) - len(case.bad)} are good and "
        f"{len(case.spares)} validated spares are free ({why})"
    )
    if case.untried:
        reason = f"{have}; these spares are probed first: {', '.join(case.untried)}"
        return Decision(DecisionKind.PROBE, "probe.spares", reason, probe_nodes=case.untried)
    since = case.now if case.budget.waiting_since is None else case.budget.waiting_since
    waited = max(0.0, case.now - since)
    left = settings.wait_for_nodes_seconds - waited
    if left <= 0:
        reason = (
            f"{have}; waited {waited:g} s for a spare (limit {settings.wait_for_nodes_seconds:g}), and a job "
            "does not run on fewer nodes than it asked for"
        )
        return _stop(case, StopCause.PLATFORM, "stop.no_nodes", reason)
    pause = min(settings.node_poll_seconds, left, case.lost_left)
    reason = (
        f"{have}; waiting for a spare, {waited:g} s so far of at most {settings.wait_for_nodes_seconds:g}"
    )
    return Decision(DecisionKind.WAIT, "wait.nodes", reason, wait_seconds=pause)


def _ask_doubtful(case: Situation) -> Decision | None:
    """What a hang waits on is probed where no spare can take its place."""
    if case.settings.probing is Probing.NEVER:
        return None
    hung = {n for f in case.grave if f.proof is Proof.WAIT_FOR for n in f.convicted}
    kept = [node for node in list(case.doubtful)[-case.short :] if node in hung and not case.answered(node)]
    if not kept:
        return None
    reason = (
        f"{case.what()}; no validated spare can replace {', '.join(kept)}, so it is probed before it stays"
    )
    return Decision(DecisionKind.PROBE, "probe.waited_on", reason, probe_nodes=tuple(kept))


def _start(case: Situation) -> Decision:
    settings = case.settings
    failures = past.checkpoint_failures(case.attempts, settings.silent_progress_seconds)
    worn: list[int] = []
    usable: list[int] = []
    for view in case.checkpoints:
        failed = max(view.failures, failures[view.step])
        if view.good:
            (worn if failed >= settings.checkpoint_failures else usable).append(view.step)
    steps = [view.step for view in case.checkpoints]
    if steps and not usable and not settings.start_over:
        reason = (
            f"none of {len(steps)} checkpoints is usable: not good, or {settings.checkpoint_failures} "
            f"failures each; starting over at step 0 would lose step {max(steps)} (start_over is off). "
            f"{case.what()}"
        )
        return _stop(case, StopCause.PLATFORM, "stop.no_checkpoint_left", reason, 3)
    chosen = max(usable, default=None)
    swaps = _swaps(case)
    pause, why_pause = _pause(case, bool(swaps) and bool(case.bad))
    parts = [case.what()]
    if swaps:
        parts += [f"{node} is replaced: {cause}" for node, cause in swaps.items()]
    missing = max(0, case.fleet.needed - len(case.nodes))
    nodes_in = case.spares[: len(swaps) + missing]
    if nodes_in:
        parts.append(f"validated spares taken: {', '.join(nodes_in)}")
    older = bool(steps) and chosen != max(steps)
    if older:
        parts.append(
            f"of checkpoints {', '.join(map(str, sorted(steps)))} the newest usable one is "
            f"{'none, so from the beginning' if chosen is None else f'step {chosen}'}"
            f" (limit of failures: {settings.checkpoint_failures})"
        )
    elif chosen is not None:
        parts.append(f"from checkpoint step {chosen}")
    else:
        parts.append("from the beginning, as no checkpoint was saved")
    parts += _kept(case, swaps)
    parts.append(why_pause)
    if nodes_in:
        kind, rule = DecisionKind.REPLACE, "replace.proven" if swaps else "replace.missing"
    elif older:
        kind, rule = DecisionKind.ROLL_BACK, "roll_back.checkpoint"
    else:
        kind, rule = DecisionKind.RESTART, "restart.in_place" if case.attempts else "restart.first"
    return Decision(
        kind,
        rule,
        "; ".join(parts),
        nodes_out=tuple(swaps),
        nodes_in=nodes_in,
        checkpoint=chosen,
        quarantine=tuple(sorted(worn)),
        wait_seconds=pause,
    )


Rule = Callable[[Situation], Decision | None]
RULES: tuple[Rule, ...] = (
    _finished,
    _goes_on,
    _users_error,
    _spent,
    _no_progress,
    _probe,
    _nodes_wanting,
    _start,
)
"""The stops come first, so that nothing is probed or waited for in vain."""


def _swaps(case: Situation) -> dict[str, str]:
    """Who goes, and why: all that must, and of the doubtful as many as there are spares left."""
    return case.bad | dict(list(case.doubtful.items())[: max(0, -case.short)])


def _kept(case: Situation, swaps: dict[str, str]) -> list[str]:
    lines = []
    if kept := [node for node in case.doubtful if node not in swaps]:
        lines.append(f"{', '.join(kept)} stays, as no validated spare is free")
    clean = [n for n in case.nodes if case.answered(n) and n not in case.bad]
    silent = [n for n in clean if case.probed[n].verdict is Verdict.UNKNOWN]
    if len(clean) > len(silent):
        lines.append(f"probes found nothing on {len(clean) - len(silent)} nodes, which prove no one guilty")
    if silent:
        lines.append(f"no probe of {', '.join(silent)} gave an answer, which proves nothing")
    return lines


def _pause(case: Situation, cured: bool) -> tuple[float, str]:
    """Seconds before the start, less those gone by already, and the words for it."""
    settings, count = case.settings, case.without_step
    if count == 0 or not case.attempts:
        return 0.0, "no back-off"
    if cured:
        return 0.0, "no back-off, as the cause is replaced"
    exponent = min(count - 1, 64)
    pause = min(settings.backoff_seconds * settings.backoff_factor**exponent, settings.backoff_cap_seconds)
    ended = case.attempts[-1].ended
    gone = 0.0 if ended is None else max(0.0, case.now - ended)
    left = max(0.0, min(pause - gone, case.lost_left))
    words = f"back-off {pause:g} s after {count} attempt(s) without a new step, of which {left:g} s are left"
    return left, words


def _unexplained(fault: Fault, case: Situation) -> bool:
    if fault.blame in (Blame.UNKNOWN, Blame.HARDWARE):
        return not fault.convicted
    # An error that no start survives, in a job that did train: its surroundings changed, on some node.
    return (
        fault.blame is Blame.USER
        and not fault.retryable
        and past.stepped(case.attempts, case.settings.silent_progress_seconds)
    )


def _seen_before(case: Situation) -> bool:
    roots = [past.root(attempt) for attempt in case.attempts[:-1]]
    return any(fault is None or _unexplained(fault, case) for fault in roots)


def _stop(case: Situation, cause: StopCause, rule: str, reason: str, lines: int = 0) -> Decision:
    """`lines`: of how many attempts at the end the decision tells."""
    tried = past.told(case.attempts, len(case.attempts) - lines) if lines else ()
    return Decision(DecisionKind.STOP, rule, reason, cause=cause, tried=tried)
