from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ltf.guard.drill import Drill, DrillError, Fault, Order, armed, flip_bit, orders_from
from ltf.guard.point import Segment
from tests.ltf.guard.training import TINY, Run, Training


def orders(*documents: dict[str, Any]) -> tuple[Order, ...]:
    return orders_from({"LTF_DRILL": json.dumps(documents if len(documents) != 1 else documents[0])})


def test_without_the_variable_nothing_is_armed() -> None:
    assert orders_from({}) == ()
    assert orders_from({"LTF_DRILL": " "}) == ()
    assert armed((), 0) == []


def test_an_order_is_read_and_announced_loudly() -> None:
    document = {"fault": "bitflip_matmul", "rank": 1, "step": 20, "segment": "experts", "persistent": True}
    (order,) = orders(document)
    assert order == Order(Fault.BITFLIP_MATMUL, 1, 20, segment=Segment.EXPERTS, persistent=True)
    (finding,) = armed([order], step=0)
    assert finding.kind == "drill.armed"
    assert "bitflip_matmul on rank 1 at step 20 and ever after" in finding.message
    assert finding.ranks == ()


def test_several_orders_may_be_given() -> None:
    assert (
        len(orders({"fault": "slow", "rank": 0, "step": 1}, {"fault": "nan_gradient", "rank": 1, "step": 2}))
        == 2
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("3", "expected a JSON object"),
        ('{"fault": "slow", "rank": 0}', "step is missing"),
        ('{"fault": "meteor", "rank": 0, "step": 1}', "'meteor' is none of bitflip_gradient"),
        ('{"fault": "slow", "rank": 0, "step": 1, "bits": 3}', "unknown key 'bits'; known are fault"),
        ('{"fault": "slow", "rank": "0", "step": 1}', "rank is '0', expected a whole number"),
        ('{"fault": "slow", "rank": 0, "step": 1, "segment": "mlp"}', "segment 'mlp' is none of"),
        ('{"fault": "slow", "rank": 0, "step": 1, "persistent": 1}', "expected true or false"),
        ('{"fault": "slow", "rank": 0, "step": 1, "seconds": "1"}', "seconds is '1', expected a number"),
    ],
)
def test_a_wrong_order_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(DrillError, match="LTF_DRILL: ") as caught:
        orders_from({"LTF_DRILL": text})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_exactly_one_bit_changes(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 20).to(dtype)
    flipped = flip_bit(tensor, 4, 9)
    both = tensor.view(torch.uint8) ^ flipped.view(torch.uint8)
    assert sum(bin(byte).count("1") for byte in both.tolist()) == 1
    assert flip_bit(flipped, 4, 9).equal(tensor)
    assert int(both.nonzero()[0]) == 4 * tensor.element_size() + 1


def test_the_sign_is_the_highest_bit() -> None:
    assert flip_bit(torch.ones(3), 1, 31).tolist() == [1.0, -1.0, 1.0]


def test_a_fault_once_hits_one_step_and_not_its_replay() -> None:
    order = Order(Fault.NAN_ACTIVATION, rank=0, step=1, segment=Segment.ATTENTION)
    training = Training(Run(TINY, orders=(order,)))
    assert [training.step(n).finding is None for n in (0, 1, 1, 2)] == [True, False, True, True]


def test_a_persistent_fault_hits_every_step_from_its_first() -> None:
    order = Order(Fault.NAN_ACTIVATION, rank=0, step=1, segment=Segment.ATTENTION, persistent=True)
    training = Training(Run(TINY, orders=(order,)))
    assert [training.step(n).finding is None for n in (0, 1, 1, 2)] == [True, False, False, False]


def test_other_ranks_and_switched_off_guards_change_nothing_about_who_is_hit() -> None:
    order = Order(Fault.NAN_ACTIVATION, rank=0, step=0, segment=Segment.ATTENTION)
    assert Drill([order], rank=1).tamper is not None
    unwatched = Training(Run(TINY, orders=(order,), finite=False, corruption=False))
    assert not torch.tensor(unwatched.step(0).loss).isfinite()
    unwatched.world.close()
    elsewhere = Training(Run(TINY, orders=(Order(Fault.NAN_ACTIVATION, rank=1, step=0),)))
    assert torch.tensor(elsewhere.step(0).loss).isfinite()
