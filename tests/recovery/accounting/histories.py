"""Random journals: all kinds of entries in any order, with times that also stand still and go back."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from recovery.accounting import (
    AttemptEnded,
    AttemptStarted,
    Blame,
    CheckpointSaved,
    Decided,
    Diagnosed,
    Diagnosing,
    Ended,
    Entry,
    FaultBegan,
    FaultDetected,
    GotNodes,
    Outcome,
    Resumed,
    RunStarted,
    Step,
    Stopped,
    Submitted,
    SupervisorAttached,
    SupervisorLost,
    Validated,
    Validating,
    WaitingForNodes,
)

START = 1_700_000_000.0
_small = st.integers(0, 4)
_seconds = st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.3, 1e4])
_causes = st.sampled_from(["device", "network", "code"])
_nodes = st.lists(st.sampled_from(["n1", "n2", "n3"]), max_size=3).map(tuple)


def _kinds(time: float) -> st.SearchStrategy[Entry]:
    at = st.just(time)
    t = st.none() | st.floats(-20, 5).map(lambda back: max(0.0, time + back))
    some: list[st.SearchStrategy[Any]] = [
        st.builds(Submitted, at, nodes=_nodes),
        st.builds(Validating, at),
        st.builds(Validated, at),
        st.builds(WaitingForNodes, at),
        st.builds(GotNodes, at),
        st.builds(AttemptStarted, at, _small, _nodes),
        st.builds(RunStarted, at, _small, t),
        st.builds(
            Resumed, at, _small, st.integers(0, 12), st.sampled_from(["restart", "roll_back"]), _seconds, t
        ),
        st.builds(CheckpointSaved, at, _small, st.integers(0, 12)),
        st.builds(FaultBegan, st.floats(-30, 5).map(lambda back: max(0.0, time + back)), _small),
        st.builds(FaultDetected, at, _small, _causes, st.sampled_from(Blame)),
        st.builds(Diagnosing, at, _small),
        st.builds(Diagnosed, at, _small, _causes, st.sampled_from(Blame)),
        st.builds(Decided, at, st.sampled_from(["restart", "replace", "stop", "continue"])),
        st.builds(AttemptEnded, at, _small, st.sampled_from(Outcome)),
        st.builds(Stopped, at),
        st.builds(Ended, at, st.sampled_from(Outcome)),
        st.builds(SupervisorLost, at),
        st.builds(SupervisorAttached, at),
    ]
    step = st.builds(
        Step,
        at,
        _small,
        st.integers(1, 12),
        _seconds,
        st.none() | st.integers(0, 4096),
        _seconds,
        st.none(),
        t,
    )
    return st.one_of(step, step, step, *some)


@st.composite
def journals(draw: st.DrawFn) -> list[Entry]:
    """Absurd histories: nothing about their order makes sense."""
    time = START
    entries: list[Entry] = []
    gaps = st.sampled_from([0.0, 1e-9, 0.3, 1.0, 17.0, 4000.0, -3.0])
    for gap in draw(st.lists(gaps, max_size=40)):
        time += gap
        entries.append(draw(_kinds(time)))
    return entries


@st.composite
def plausible(draw: st.DrawFn) -> list[Entry]:
    """History as a supervisor writes them: attempts with steps and saves, faults, restarts, maybe an end."""
    time = START
    entries: list[Entry] = [Submitted(time, nodes=("n1", "n2"))]
    step = saved = 0

    def later() -> float:
        nonlocal time
        time += draw(st.sampled_from([0.0, 0.25, 1.0, 30.0]))
        return time

    for attempt in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            entries += [WaitingForNodes(later()), GotNodes(later())]
        if draw(st.booleans()):
            entries += [Validating(later()), Validated(later())]
        entries.append(AttemptStarted(later(), attempt, ("n1", "n2")))
        if attempt and draw(st.booleans()):
            entries.append(Resumed(later(), attempt, saved, seconds=0.5))
            step = saved
        for _ in range(draw(st.integers(0, 6))):
            step += 1
            entries.append(Step(later(), attempt, step, 0.25, 64, draw(st.sampled_from([0.0, 0.125]))))
            if draw(st.integers(0, 3)) == 0:
                saved = step
                entries.append(CheckpointSaved(time, attempt, saved))
            if saved and draw(st.integers(0, 9)) == 0:
                step = saved
                entries.append(Resumed(later(), attempt, saved, "roll_back", 0.5, cause="loss.spike"))
        sign = time
        entries.append(FaultDetected(later(), attempt, draw(_causes)))
        if draw(st.booleans()):
            entries.append(FaultBegan(sign, attempt))
        entries += [Diagnosing(later(), attempt), Diagnosed(later(), attempt, draw(_causes))]
        entries += [Decided(later(), "restart"), AttemptEnded(later(), attempt)]
    if draw(st.booleans()):
        entries.append(Ended(later(), draw(st.sampled_from(Outcome))))
    return entries
