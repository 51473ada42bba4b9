"""What is decided is stored exactly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.supervise.model import Attempt, Decision, DecisionKind, Fault, FleetView
from recovery.supervise.settings import Settings
from recovery.supervise.stored import StoredError, from_json, to_json
from tests.recovery.supervise.building import BAD_NODE, attempt, fleet


@settings(max_examples=60, deadline=None)
@given(st.one_of(*(st.from_type(kind) for kind in (Fault, Attempt, Decision, FleetView))))
def test_every_value_comes_back_as_it_was(value: Fault | Attempt | Decision | FleetView) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(type(value), json.loads(text))
    assert repr(back) == repr(value), "by its words, as NaN is not itself"


def test_settings_come_back_too() -> None:
    assert from_json(Settings, to_json(Settings(max_attempts=7))) == Settings(max_attempts=7)


def test_fields_of_another_version_are_passed_over_and_missing_ones_take_their_defaults() -> None:
    data = to_json(attempt(1, faults=(BAD_NODE,)))
    del data["tells_steps"]
    assert from_json(Attempt, {**data, "colour": "blue"}) == attempt(1, faults=(BAD_NODE,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sleep"}, r"Decision\.kind: 'sleep' is none of continue"),
        ({"nodes_out": "n1"}, r"Decision\.nodes_out: expected a list, found str 'n1'"),
        ({"nodes_out": [1]}, r"Decision\.nodes_out\[0\]: expected str, found int 1"),
        ({"wait_seconds": True}, r"Decision\.wait_seconds: expected float"),
        ({"checkpoint": 1.5}, r"Decision\.checkpoint: expected int"),
    ],
)
def test_data_of_another_shape_is_refused_with_its_place(change: dict[str, object], message: str) -> None:
    data = to_json(Decision(DecisionKind.RESTART, "rule", "reason"))
    with pytest.raises(StoredError, match=message):
        from_json(Decision, {**data, **change})


def test_a_missing_field_without_a_default_is_refused() -> None:
    data = to_json(fleet())
    del data["needed"]
    with pytest.raises(StoredError, match="'needed' is missing"):
        from_json(FleetView, data)


def test_what_has_no_way_back_is_not_stored() -> None:
    with pytest.raises(TypeError, match="set"):
        to_json({1, 2})
