"""The order of samples: permutations, shares of ranks, and that neither needs any state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltf.data.errors import DataError
from ltf.data.order import (
    Permutation,
    epoch_permutation,
    micro_batches,
    mix,
    samples_of_step,
    share_of_rank,
)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_size_and_key_gives_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@given(size=st.integers(1, 2**61), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_position_asked_alone_goes_where_it_goes_among_others(
    size: int, key: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    together = Permutation(size, key)(np.array(positions))
    assert [int(Permutation(size, key)(position)) for position in positions] == together.tolist()
    assert len(set(together.tolist())) == len(positions)
    assert all(0 <= place < size for place in together.tolist())


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", [3, 4])
def test_all_permutations_of_a_small_set_are_equally_likely(size: int) -> None:
    keys = 2400
    seen = Counter(tuple(epoch_permutation(size, 0, 0, epoch)(np.arange(size))) for epoch in range(keys))
    cells = {3: 6, 4: 24}[size]
    assert len(seen) == cells
    # The 99.99th percentile of chi-square with 5 and 23 degrees of freedom.
    assert chi_square(np.array(list(seen.values()))) < {3: 25.7, 4: 55.6}[size]


def test_each_position_is_equally_likely_to_hold_each_sample() -> None:
    size, epochs = 37, 1500
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), epoch_permutation(size, 7, 1, epoch)(np.arange(size))] += 1
    degrees = (size - 1) ** 2
    assert abs(chi_square(counts) - degrees) < 4.5 * (2 * degrees) ** 0.5


def test_a_large_permutation_mixes_neighbours_apart_and_differs_by_epoch() -> None:
    size = 10**9 + 7
    near = np.arange(20_000)
    first, second = (epoch_permutation(size, 1, 0, epoch)(near) for epoch in (0, 1))
    for order in (first, second):
        # Uniform places: mean 1/2, and no correlation between a place and the next.
        unit = order / size
        assert abs(unit.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04


def test_seed_source_and_epoch_each_change_the_order() -> None:
    orders = {
        tuple(epoch_permutation(1000, *key)(np.arange(1000)).tolist())
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    }
    assert len(orders) == 5


def test_the_order_is_the_one_that_the_first_release_had() -> None:
    """A resumed run must see the same order with a later version."""
    assert epoch_permutation(10, 1234, 0, 0)(np.arange(10)).tolist() == [1, 3, 0, 7, 9, 2, 6, 4, 8, 5]
    assert epoch_permutation(10**12, 1234, 3, 2)([0, 1, 10**12 - 1]).tolist() == [
        957179914885,
        240314312859,
        770173750633,
    ]


@given(size=st.integers(1, 2**61), key=st.integers(0, 2**64 - 1), data=st.data())
def test_many_positions_at_once_go_where_the_rounds_written_plainly_send_them(
    size: int, key: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, size - 1))
    at = position
    for number in range(6 * max(8, size.bit_length())):
        mirror = ((mix(key + 2 * number) * size >> 64) - at) % size
        if mix(max(at, mirror) + mix(key + 2 * number + 1)) >> 63:
            at = mirror
    assert int(Permutation(size, key)(position)) == at


@given(
    step=st.integers(0, 10**9),
    world=st.integers(1, 16),
    per_rank=st.integers(1, 12),
)
def test_the_ranks_of_a_step_share_its_samples_whatever_their_number(
    step: int, world: int, per_rank: int
) -> None:
    batch = world * per_rank
    samples = samples_of_step(step, batch)
    shared = [index for rank in range(world) for index in share_of_rank(samples, rank, world)]
    assert shared == list(range(step * batch, (step + 1) * batch))


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(DataError, match=r"global batch of 10 samples does not divide among 4.*take 8 or 12"):
        share_of_rank(range(10), 0, 4)
    with pytest.raises(DataError, match="6 samples a rank do not divide into micro-batches of 4"):
        micro_batches(range(6), 4)
