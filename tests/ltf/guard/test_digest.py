from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltf.guard.digest import COLUMNS, Record, digest, digest_all
from ltf.guard.drill import flip_bit
from ltf.guard.point import Phase, Point, Segment

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.one_of(st.integers(1, 40), st.integers(4 * COLUMNS - 9, 4 * COLUMNS + 9), st.integers(30_000, 40_000)),
    st.data(),
)
def test_one_flipped_bit_anywhere_changes_the_digest(
    dtype: torch.dtype, count: int, data: st.DataObject
) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    element = data.draw(st.integers(0, count - 1))
    bit = data.draw(st.integers(0, tensor.element_size() * 8 - 1))
    assert digest(flip_bit(tensor, element, bit)) != digest(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_have_equal_digests_whatever_the_layout_in_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(7 * 1001).remainder(113).view(7, 1001).to(dtype)
    padded = torch.cat([torch.ones(7, 3, dtype=dtype), tensor], dim=1)[:, 3:]
    assert digest(tensor) == digest(padded) == digest(tensor.t().contiguous().t())


def test_a_view_that_does_not_begin_at_eight_bytes_is_digested() -> None:
    tensor = torch.arange(101.0)
    assert digest(tensor[1:]) == digest(tensor[1:].clone())


def test_values_that_trade_places_change_the_digest() -> None:
    tensor = torch.randn(5000)
    swapped = tensor.clone()
    swapped[[10, 4000]] = swapped[[4000, 10]]
    assert digest(swapped) != digest(tensor)


@pytest.mark.parametrize("places", [(3, 3 + 128), (10, 9000), (8191, 8192), (100, 300_000)])
def test_values_of_a_large_tensor_that_trade_places_change_the_digest(places: tuple[int, int]) -> None:
    # In neighbouring rows of a block the columns are 128 values wide: the first pair trades what looks alike.
    tensor = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    swapped = tensor.clone()
    swapped[list(places)] = swapped[list(reversed(places))]
    alike = (places[1] - places[0]) % 128 == 0 and places[1] < 8192
    assert bool(digest(swapped) == digest(tensor)) is alike


@pytest.mark.parametrize("count", [0, 5, 8192, 8193, 262_144, 600_001])
def test_what_is_shown_beside_the_digest_is_all_of_the_tensor_once(count: int) -> None:
    tensor = torch.arange(float(count))
    parts: list[torch.Tensor] = []
    assert digest(tensor, parts.append) == digest(tensor)
    assert torch.equal(torch.cat([torch.empty(0), *parts]), tensor)


def test_tensors_that_trade_places_change_the_digest() -> None:
    a, b = torch.randn(10), torch.randn(10)
    assert digest_all([a, b]) != digest_all([b, a])


def test_signs_of_zero_and_payloads_of_nan_count() -> None:
    assert digest(torch.tensor([0.0, 1.0])) != digest(torch.tensor([-0.0, 1.0]))
    nan = torch.tensor([float("nan"), 1.0])
    assert digest(nan) == digest(nan.clone())
    assert digest(flip_bit(nan, 0, 3)) != digest(nan)


def test_an_empty_tensor_has_a_digest() -> None:
    assert digest(torch.empty(0, 16)) == digest(torch.empty(0))


def test_the_first_difference_is_the_one_that_caused_the_others() -> None:
    forward, later = (Point(Phase.FORWARD, 0, layer, Segment.FFN) for layer in (3, 4))
    backward = Point(Phase.BACKWARD, 0, 4, Segment.FFN)
    bucket = Point(Phase.BUCKET, 0, 4, Segment.BLOCK)
    clean = Record({forward: 1, later: 2, backward: 3, bucket: 4})
    spoiled = Record({forward: 1, later: 5, backward: 6, bucket: 7})
    found = clean.difference(spoiled)
    assert (found.first, found.differing, found.compared) == (later, 3, 4)
    assert clean.difference(clean).first is None


def test_a_point_that_one_run_lacks_is_a_difference() -> None:
    point = Point(Phase.FORWARD, 0, 3, Segment.FFN)
    assert Record({point: 1}).difference(Record()).differing == 1
