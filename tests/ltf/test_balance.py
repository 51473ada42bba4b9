"""Who takes how many micro-batches."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ltf.balance import Balancer, Plan, by_unit, even, plan, share
from ltf.config import schema
from ltf.data.errors import DataError
from ltf.data.loader import Batch
from ltf.data.order import micro_batches, share_of_rank
from ltf.passes import Totals
from ltf.train.accumulation import Accumulation
from tests.ltf import ranks
from tests.ltf.model.shapes import DENSE, MOE, decoder

SPEEDS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)
AUTO = schema.Balance(mode="auto", every_steps=4, window=4, threshold=1.05)


def slowest(counts: tuple[int, ...], seconds: list[float]) -> float:
    return max(count * each for count, each in zip(counts, seconds, strict=True))


@given(SPEEDS, st.integers(0, 8), st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_no_other_counts_finish_sooner(seconds: list[float], more: int, least: int) -> None:
    total = least * len(seconds) + more
    counts = plan(total, seconds, least)
    assert sum(counts) == total
    assert min(counts) >= least
    every = (c for c in itertools.product(range(least, total + 1), repeat=len(seconds)) if sum(c) == total)
    assert slowest(counts, seconds) == min(slowest(each, seconds) for each in every)


def test_a_unit_at_half_speed_takes_half_as_much() -> None:
    assert plan(12, [1.0, 2.0]) == (8, 4)
    assert plan(12, [1.0, 1.0, 1.0]) == (4, 4, 4)


@pytest.mark.parametrize("seconds", [[], [1.0, 0.0], [1.0, float("nan")], [float("inf")]])
def test_speeds_that_are_no_speeds_are_refused(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="seconds of a micro-batch"):
        plan(4, seconds)


def test_fewer_micro_batches_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 each"):
        plan(1, [1.0, 1.0])


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_units_and_their_ranks_take_the_steps_samples_in_order_each_once(
    counts: list[int], members: int, micro: int, first: int
) -> None:
    samples = range(first, first + sum(counts) * members * micro)
    taken = [
        share(samples, counts, unit, member, members, micro)
        for unit in range(len(counts))
        for member in range(members)
    ]
    assert [sample for batches in taken for batch in batches for sample in batch] == list(samples)
    assert [len(batches) for batches in taken] == [count for count in counts for _ in range(members)]
    assert {len(batch) for batches in taken for batch in batches} == {micro}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_even_plan_is_what_the_data_order_gives_each_data_rank(
    units: int, members: int, each: int, micro: int
) -> None:
    samples = range(7, 7 + units * members * each * micro)
    counts = even(units * each, units)
    for rank in range(units * members):
        expected = micro_batches(share_of_rank(samples, rank, units * members), micro)
        assert share(samples, counts, rank // members, rank % members, members, micro) == expected


def test_a_plan_for_another_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="9 samples a step are not 4 micro-batches of 2 samples"):
        share(range(9), (2, 2), 0, micro=2)


def test_a_unit_is_as_slow_as_its_slowest_rank_and_unknown_where_one_is_unknown() -> None:
    assert by_unit([1.0, 3.0, 2.0, 1.0], [0, 0, 1, 1]) == [3.0, 2.0]
    first, second = by_unit([float("nan"), 3.0, 2.0, 1.0], [0, 0, 1, 1])
    assert (first != first, second) == (True, 2.0)


def test_a_plan_comes_when_it_is_due_and_tells_what_it_promises() -> None:
    balancer = Balancer(AUTO, units=2, total=12)
    plans = []
    for step in range(1, 9):
        balancer.observe(step, [1.0, 2.0])
        plans.append(balancer.replan(step))
    assert plans[3] == Plan(
        step=4, counts=(8, 4), counts_before=(6, 6), seconds_before=12.0, seconds_after=8.0
    )
    assert [made for made in plans if made] == [plans[3]]
    assert balancer.counts == (8, 4)


def test_what_promises_too_little_changes_nothing() -> None:
    balancer = Balancer(AUTO, units=2, total=40)
    for step in range(1, 5):
        balancer.observe(step, [1.0, 1.08])
    assert balancer.replan(4) is None
    assert balancer.counts == (20, 20)


def test_noise_about_equal_speeds_never_moves_a_micro_batch() -> None:
    balancer = Balancer(AUTO, units=2, total=8)
    for step in range(1, 200):
        balancer.observe(step, [1.0 + 0.3 * (step % 3 == 0), 1.0 + 0.3 * (step % 5 == 0)])
        assert balancer.replan(step) is None


def test_a_disturbance_that_passes_within_the_window_moves_nothing() -> None:
    balancer = Balancer(AUTO.model_copy(update={"every_steps": 8, "window": 8}), units=2, total=12)
    for step in range(1, 100):
        # Five slow steps: more than half of a window, but not of both its halves.
        balancer.observe(step, [1.0, 4.0 if 44 <= step <= 48 else 1.0])
        assert balancer.replan(step) is None


def test_a_plan_that_saves_too_little_time_to_matter_is_not_made() -> None:
    for saved, expected in ((16.1, (6, 6)), (15.9, (8, 4))):
        balancer = Balancer(AUTO.model_copy(update={"saved_seconds": saved}), units=2, total=12)
        for step in range(1, 5):
            # 12 seconds a step become 8: 16 in the window of four.
            balancer.observe(step, [1.0, 2.0])
        balancer.replan(4)
        assert balancer.counts == expected


def test_a_unit_that_recovers_gets_its_share_back() -> None:
    balancer = Balancer(AUTO, units=2, total=12)
    for step in range(1, 17):
        balancer.observe(step, [1.0, 2.0 if step <= 8 else 1.0])
        balancer.replan(step)
    assert balancer.counts == (6, 6)


def test_static_balance_never_replans() -> None:
    balancer = Balancer(schema.Balance(mode="static", every_steps=1, window=1), units=2, total=12)
    balancer.observe(1, [1.0, 9.0])
    assert balancer.replan(1) is None


def test_a_step_that_was_not_measured_everywhere_does_not_count() -> None:
    balancer = Balancer(AUTO, units=2, total=12)
    for step in range(1, 5):
        balancer.observe(step, [1.0, float("nan")])
    assert balancer.replan(4) is None


def test_a_restored_balancer_goes_on_as_if_nothing_had_happened() -> None:
    def fed(balancer: Balancer, steps: range) -> list[Plan | None]:
        made = []
        for step in steps:
            balancer.observe(step, [1.0 + step / 10, 2.0])
            made.append(balancer.replan(step))
        return made

    whole, first, second = (Balancer(AUTO, 2, 12) for _ in range(3))
    expected = fed(whole, range(1, 20))
    begun = fed(first, range(1, 7))
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + fed(second, range(7, 20)) == expected
    assert any(expected)


def test_a_state_of_another_layout_is_left_and_the_even_plan_kept() -> None:
    other = Balancer(AUTO, units=3, total=12)
    other.counts = (6, 3, 3)
    balancer = Balancer(AUTO, units=2, total=12)
    balancer.restore(other.state())
    assert balancer.counts == (6, 6)


def of_samples(samples: range, length: int, vocabulary: int) -> Batch:
    """A sample's tokens follow from its number alone."""
    rows = [
        torch.randint(vocabulary, (length + 1,), generator=torch.Generator().manual_seed(sample))
        for sample in samples
    ]
    tokens = torch.stack(rows)
    zeros = torch.zeros(len(samples), length, dtype=torch.int64)
    ones = torch.ones_like(zeros)
    return Batch(tuple(samples), tokens[:, :-1], tokens[:, 1:], ones, zeros, zeros)


def gradients(counts: tuple[int, ...], moe: bool) -> tuple[float, list[torch.Tensor]]:
    """The loss of a global batch and its gradients when ranks take that many micro-batches."""
    dist.init_process_group("gloo")
    try:
        model = decoder(MOE if moe else DENSE, seed=1)
        batches = [
            of_samples(batch, 16, model.args.vocab_size)
            for batch in share(range(100, 112), counts, dist.get_rank(), micro=2)
        ]
        # A rank whose tokens leave an expert out has no gradient for it; all send as many elements.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        totals = Totals(loss_tokens=12 * 16, tokens=12 * 16, rows=12, counts={})
        passed = Accumulation(model, masked=False)(batches, totals)
        summed = [passed.loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        for tensor in summed:
            dist.all_reduce(tensor)
        return float(summed[0]), summed[1:]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("moe", [False, True])
def test_an_uneven_plan_gives_the_loss_and_the_gradients_of_the_even_one(moe: bool) -> None:
    (loss, expected), _ = ranks.run(gradients, 2, (3, 3), moe)
    for counts in ((5, 1), (2, 4)):
        for other, uneven in ranks.run(gradients, 2, counts, moe):
            assert other == pytest.approx(loss, rel=1e-6)
            assert len(uneven) == len(expected)
            for one, two in zip(expected, uneven, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
