"""What the policy never does, whatever a job lives through."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.blame import Blame
from recovery.supervise.model import (
    Attempt,
    Budget,
    CheckpointView,
    DecisionKind,
    Ending,
    Fault,
    FleetView,
    Proof,
    StopCause,
)
from recovery.supervise.policy import decide
from recovery.supervise.settings import Settings
from tests.recovery.supervise.adversary import World


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32))
def test_no_history_makes_it_evict_without_proof_overdraw_a_budget_or_go_on_for_ever(seed: int) -> None:
    """Each example is a job's whole life against a world that breaks every attempt; see `World._judge`."""
    assert World(seed).run().reason


def test_the_random_lives_come_by_every_kind_of_decision_and_every_cause_to_stop() -> None:
    kinds: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for seed in range(400):
        world = World(seed)
        causes[str(world.run().cause)] += 1
        kinds += world.kinds
    assert set(kinds) == set(DecisionKind)
    assert set(causes) == set(StopCause) - {StopCause.DONE, StopCause.ASKED}, "it never lets a job finish"


NODES = st.sampled_from(["n1", "n2", "s1", "u1"])
NAMED = st.lists(NODES, max_size=2, unique=True).map(tuple)
FAULTS = st.builds(
    Fault,
    kind=st.sampled_from(["rank.killed", "code.exception"]),
    blame=st.sampled_from(Blame),
    message=st.just("it broke"),
    nodes=NAMED,
    suspects=NAMED,
    proof=st.sampled_from([Proof.NONE, Proof.EXIT, Proof.KERNEL_LOG]),
    place=st.sampled_from([None, "a.py:1 KeyError"]),
    retryable=st.booleans(),
    ends=st.booleans(),
)
ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        number=st.just(0),
        nodes=st.just(("n1", "n2")),
        started=st.floats(0, 1e5),
        ending=st.just(Ending.FAILED),
        ended=st.floats(1e5, 2e5),
        resumed_from=st.none() | st.integers(0, 9),
        last_step=st.none() | st.integers(1, 20),
        durable_step=st.none() | st.integers(1, 20),
        faults=st.lists(FAULTS, max_size=1).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(ATTEMPTS, st.lists(FAULTS, max_size=2), NAMED, st.lists(st.integers(1, 9), max_size=3, unique=True))
def test_without_proof_no_node_goes_and_taking_the_proof_away_takes_the_eviction_away(
    history: list[Attempt], faults: list[Fault], spares: tuple[str, ...], steps: list[int]
) -> None:
    fleet = FleetView(("n1", "n2"), 2, spares=spares)
    views = [CheckpointView(step) for step in steps]
    bare = [replace(fault, proof=Proof.EXIT) for fault in faults]
    decision = decide(history, bare, Budget(), fleet, views, Settings(), 2e5)
    assert not decision.nodes_out
    assert not decision.nodes_in
