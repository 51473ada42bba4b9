"""The states of a node: the table that ships, and what verdicts do to it."""

import pytest

from inventory import lifecycle
from inventory.errors import DocumentError, UsageError
from inventory.lifecycle import IllegalTransition, State
from inventory.lifecycle_table import read_table

VERDICTS = ("healthy", "degraded", "unhealthy", "unknown")

# What each verdict leads to, in the order of VERDICTS. None: stays. "*": only when the evidence is cleared.
AFTER_VALIDATION = {
    "new": ("available", None, "cordoned", None),
    "validating": ("available", None, "cordoned", None),
    "available": (None, None, "cordoned", None),
    "allocated": (None, None, "draining", None),
    "draining": (None, None, None, None),
    "cordoned": ("available*", None, None, None),
    "triaged_hardware": (None, None, None, None),
    "triaged_user": ("available", None, "cordoned", None),
    "triaged_platform": ("available*", None, None, None),
    "triaged_unknown": ("available*", None, "cordoned", None),
    "restarting": (None, None, None, None),
    "repairing": (None, None, None, None),
    "held": (None, None, None, None),
    "retired": (None, None, None, None),
}


def test_every_state_is_in_the_expected_table() -> None:
    assert set(AFTER_VALIDATION) == {state.value for state in State}


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("state", AFTER_VALIDATION)
def test_a_verdict_leads_where_the_table_says(state: str, verdict: str) -> None:
    expected = AFTER_VALIDATION[state][VERDICTS.index(verdict)]
    uncleared = lifecycle.next_after_validation(state, verdict)
    cleared = lifecycle.next_after_validation(state, verdict, cleared=True)
    plain = None if expected is None else expected.rstrip("*")
    assert (cleared.target if cleared else None) == plain
    assert (uncleared.target if uncleared else None) == (
        None if expected is None or "*" in expected else plain
    )


def test_a_verdict_nobody_knows_is_a_bug_and_not_a_healthy_node() -> None:
    with pytest.raises(ValueError, match="fine"):
        lifecycle.next_after_validation("new", "fine")


@pytest.mark.parametrize("state", State)
def test_an_unknown_verdict_moves_no_node_and_admits_none(state: State) -> None:
    assert lifecycle.next_after_validation(state, "unknown", cleared=True) is None


def test_jobs_take_available_nodes_and_no_others() -> None:
    assert [state for state in State if lifecycle.jobs_take(state)] == [State.AVAILABLE]


def test_nothing_new_reaches_a_job_without_becoming_available_first() -> None:
    into = {source for source in State if State.ALLOCATED in lifecycle.describe(source).ways}
    assert into == {State.AVAILABLE, State.DRAINING}


@pytest.mark.parametrize("state", ["allocated", "draining", "held", "repairing", "restarting", "retired"])
def test_a_node_that_somebody_uses_is_loaded_only_when_told(state: str) -> None:
    assert not lifecycle.may_load(state)
    assert lifecycle.may_load(state, told=True)


@pytest.mark.parametrize("state", ["new", "validating", "available", "cordoned", "triaged_hardware"])
def test_a_node_that_nobody_uses_may_be_loaded(state: str) -> None:
    assert lifecycle.may_load(state)


def test_an_illegal_transition_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(
        IllegalTransition, match=r"not go from new to allocated.*available, cordoned, held"
    ) as caught:
        lifecycle.transition("new", "allocated")
    assert isinstance(caught.value, UsageError)


def test_staying_is_no_transition_and_the_refusal_says_so() -> None:
    with pytest.raises(IllegalTransition, match="already cordoned"):
        lifecycle.transition("cordoned", "cordoned")


def test_a_misspelt_state_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no node state 'cordonned'.*cordoned"):
        lifecycle.parse("cordonned")


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_reached_from_new_and_lead_back_to_service(state: State) -> None:
    def reachable(start: State) -> set[State]:
        seen, todo = {start}, [start]
        while todo:
            for following in lifecycle.describe(todo.pop()).ways:
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    assert state in reachable(State.NEW)
    assert State.AVAILABLE in reachable(state)


@pytest.mark.parametrize("state", [state for state in State if state is not State.HELD])
def test_a_person_may_take_any_node_that_is_in_the_fleet(state: State) -> None:
    assert (State.HELD in lifecycle.describe(state).ways) == (state is not State.RETIRED)


@pytest.mark.parametrize("state", State)
def test_every_state_and_every_way_has_its_sentence(state: State) -> None:
    facts = lifecycle.describe(state)
    assert all(
        text.endswith(".") and len(text) > 10
        for text in (facts.means, *(w.means for w in facts.ways.values()))
    )


def test_each_state_of_the_original_platform_has_one_home() -> None:
    names = [name for state in State for name in lifecycle.describe(state).original]
    assert len(names) == len(set(names))
    assert set(names) == {
        "new", "validating", "available", "available_nodata", "cordoned", "deallocated_capacity",
        "triaged_hardware", "triaged_user", "triaged_platform", "triaged_unknown",
        "ua", "deallocated_ua", "ready_ua", "allocated_ua", "deallocated_platform", "allocated_platform",
    }  # fmt: skip


FINDINGS = {
    "findings": [
        {"check": "compute.gemm", "outcome": "fail"},
        {"check": "host.swap", "outcome": "warn"},
    ]
}


def test_evidence_is_cleared_when_each_failed_check_ran_again_and_passed() -> None:
    assert lifecycle.clears(FINDINGS, {"compute.gemm": "pass"})


@pytest.mark.parametrize("outcome", ["fail", "warn", "unknown", "timeout", "unsupported"])
def test_evidence_is_not_cleared_by_anything_but_a_pass(outcome: str) -> None:
    assert not lifecycle.clears(FINDINGS, {"compute.gemm": outcome})


def test_a_plan_without_the_failed_check_clears_nothing() -> None:
    assert not lifecycle.clears(FINDINGS, {"host.swap": "pass"})


@pytest.mark.parametrize("evidence", [{}, {"findings": []}, {"findings": "none"}, {"ticket": 7}])
def test_evidence_that_names_no_failed_check_cannot_be_cleared(evidence: dict[str, object]) -> None:
    assert not lifecycle.clears(evidence, {"compute.gemm": "pass"})


def test_a_table_without_a_state_is_refused() -> None:
    with pytest.raises(DocumentError, match="these states are missing: validating"):
        read_table(
            "states: {new: {means: x, jobs_take: false, load: allowed, original: [],"
            " after_validation: {}, to: {}}}"
        )


def test_a_table_whose_rule_has_no_way_is_refused_at_its_line() -> None:
    states = "\n".join(
        f"  {state}: {{means: x, jobs_take: false, load: allowed, original: [], to: {{}},\n"
        f"    after_validation: {{healthy: {'available' if state == 'held' else 'stay'}, degraded: stay,"
        " unhealthy: stay, unknown: stay}}"
        for state in State
    ).replace("}}}}", "}}")
    with pytest.raises(DocumentError, match=r"lifecycle.yaml:27: .*there is no way from held to available"):
        read_table(f"states:\n{states}\n")
