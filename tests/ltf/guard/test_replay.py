from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from ltf.config.schema import Parallel, PipelineSchedule
from ltf.findings import Finding, Severity
from ltf.guard.drill import Fault, Order, flip_bit
from ltf.guard.point import Phase, Segment
from ltf.guard.replay import Outcome
from ltf.guard.verdict import Kind
from ltf.model.args import ModelArgs
from tests.ltf import ranks
from tests.ltf.guard.training import ALONE, TINY, TINY_MOE, Done, Run, Training, layout, steps

GRADIENT, MATMUL = Fault.BITFLIP_GRADIENT, Fault.BITFLIP_MATMUL
DP2, DP3, EP2, PP2 = layout(shard=2), layout(shard=3), layout(shard=2, expert=2), layout(pipeline=2)
SPIKE = Finding("spike.loss", Severity.WARNING, 2, "the loss is 40 median deviations above its median")


@functools.cache
def clean(args: ModelArgs, parallel: Parallel, count: int) -> Done:
    return last(Run(args, parallel), count)


def last(
    run: Run, count: int = 1, *, replays: tuple[int, ...] = (2,), suspected: Finding | None = None
) -> Done:
    """The last step's result of steps 0 to 2, after that all ranks have decided the same."""
    if count == 1:
        return steps(run, [0, 1, 2], replays, suspected)[-1]  # type: ignore[no-any-return]
    results = [done[-1] for done in ranks.run(steps, count, run, [0, 1, 2], replays, suspected)]
    assert len({str(result.outcome and result.outcome.verdict) for result in results}) == 1
    return results[0]  # type: ignore[no-any-return]


def outcome(done: Done) -> Outcome:
    assert done.outcome is not None
    return done.outcome


@pytest.mark.parametrize(
    ("args", "parallel", "count"),
    [(TINY, ALONE, 1), (TINY, DP2, 2), (TINY_MOE, EP2, 2), (TINY, PP2, 2), (TINY, DP3, 3)],
    ids=["alone", "dp2", "ep2", "pp2", "dp3"],
)
def test_a_step_without_a_fault_is_clean_and_stays_as_it_was(args: Any, parallel: Any, count: int) -> None:
    done = clean(args, parallel, count)
    assert outcome(done).verdict.kind is Kind.CLEAN
    assert outcome(done).finding is None
    assert not outcome(done).repaired
    untouched = last(Run(args, parallel), count, replays=())
    assert all(torch.equal(a, b) for a, b in zip(done.gradients, untouched.gradients, strict=True))


@pytest.mark.parametrize(
    ("args", "parallel", "count"),
    [(TINY, ALONE, 1), (TINY, DP2, 2), (TINY_MOE, EP2, 2), (TINY, PP2, 2), (TINY, DP3, 3)],
    ids=["alone", "dp2", "ep2", "pp2", "dp3"],
)
@pytest.mark.parametrize("fault", [GRADIENT, MATMUL])
def test_a_bit_flipped_once_is_a_transient_fault_of_its_rank_and_is_repaired(
    args: Any, parallel: Any, count: int, fault: Fault
) -> None:
    rank = count - 1
    segment = Segment.ATTENTION if fault is MATMUL else None
    order = Order(fault, rank=rank, step=2, layer=1, segment=segment, element=5, bit=3)
    done = last(Run(args, parallel, orders=(order,)), count)
    verdict = outcome(done).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.TRANSIENT, (rank,))
    assert verdict.point is not None
    expected = (Phase.FORWARD, 1, Segment.ATTENTION) if segment else (Phase.BUCKET, 1, Segment.BLOCK)
    assert (verdict.point.phase, verdict.point.layer, verdict.point.segment) == expected
    assert outcome(done).repaired
    assert outcome(done).trusted
    same = clean(args, parallel, count)
    assert all(torch.equal(a, b) for a, b in zip(done.gradients, same.gradients, strict=True))


@pytest.mark.parametrize("segment", [Segment.EXPERTS, Segment.ROUTER])
def test_a_flip_is_traced_to_its_segment_although_other_ranks_see_it_too(segment: Segment) -> None:
    order = Order(MATMUL, rank=0, step=2, layer=0, segment=segment, bit=20, element=3)
    verdict = outcome(last(Run(TINY_MOE, EP2, orders=(order,)), 2)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.TRANSIENT, (0,))
    assert verdict.point is not None
    assert verdict.point.segment is segment


@pytest.mark.parametrize("schedule", [PipelineSchedule.INTERLEAVED, PipelineSchedule.ZERO_BUBBLE])
def test_a_flip_is_traced_in_every_pipeline_schedule(schedule: PipelineSchedule) -> None:
    # Two stages a rank: under both schedules rank 1 holds layer 1.
    order = Order(MATMUL, rank=1, step=2, layer=1, segment=Segment.FFN, bit=3)
    run = Run(replace(TINY, layers=4), layout(pipeline=2, schedule=schedule), orders=(order,))
    verdict = outcome(last(run, 2)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.TRANSIENT, (1,))
    assert verdict.point is not None
    assert (verdict.point.layer, verdict.point.segment) == (1, Segment.FFN)


def test_a_flip_in_a_step_that_was_not_digested_whole_is_traced_to_its_rank_on_suspicion() -> None:
    order = Order(MATMUL, rank=1, step=2, layer=1, segment=Segment.FFN, bit=29)
    done = last(Run(TINY, DP2, orders=(order,)), 2, replays=(), suspected=SPIKE)
    assert (outcome(done).verdict.kind, outcome(done).verdict.ranks) == (Kind.TRANSIENT, (1,))
    assert outcome(done).repaired


def test_a_flip_during_the_replay_leaves_the_original_in_place() -> None:
    done = last(Run(TINY, DP2, alter=_flip_in_the_replay), 2)
    verdict = outcome(done).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.TRANSIENT, (1,))
    assert "its replay" in verdict.message
    assert not outcome(done).repaired
    same = clean(TINY, DP2, 2)
    assert all(torch.equal(a, b) for a, b in zip(done.gradients, same.gradients, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_device_that_computes_it_wrong_every_time_is_named_by_its_partners(rank: int) -> None:
    order = _every_time(rank)
    verdict = outcome(last(Run(TINY, DP3, orders=(order,)), 3)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.PERSISTENT, (rank,))
    assert verdict.point is not None
    assert (verdict.point.layer, verdict.point.segment) == (1, Segment.ATTENTION)


def test_of_two_units_that_disagree_both_are_to_be_probed() -> None:
    verdict = outcome(last(Run(TINY, DP2, orders=(_every_time(1),)), 2)).verdict
    assert (verdict.kind, verdict.ranks, verdict.candidates) == (Kind.PERSISTENT, (), (0, 1))


def test_of_two_units_that_disagree_the_suspected_rank_is_named() -> None:
    suspicion = replace(SPIKE, ranks=(1,))
    run = Run(TINY, DP2, orders=(_every_time(1),))
    verdict = outcome(last(run, 2, suspected=suspicion)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.PERSISTENT, (1,))


def test_in_two_units_of_two_ranks_the_pair_at_the_faulty_place_is_to_be_probed() -> None:
    order = replace(_every_time(3), segment=Segment.EXPERTS)
    run = Run(TINY_MOE, layout(shard=4, expert=2), orders=(order,))
    verdict = outcome(last(run, 4)).verdict
    assert (verdict.kind, verdict.ranks, verdict.candidates) == (Kind.PERSISTENT, (), (1, 3))


def test_with_one_unit_a_suspicion_stays_undetermined() -> None:
    verdict = outcome(last(Run(TINY, orders=(_every_time(0),)), suspected=SPIKE)).verdict
    assert verdict.kind is Kind.UNDETERMINED
    assert "one unit" in verdict.message


def test_a_device_that_computes_it_differently_each_time_is_a_persistent_fault() -> None:
    verdict = outcome(last(Run(TINY, DP3, alter=_noise_on_the_last), 3)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.PERSISTENT, (2,))


@pytest.mark.parametrize("count", [2, 3])
def test_a_suspicious_step_that_all_devices_compute_alike_is_the_models_own_doing(count: int) -> None:
    verdict = outcome(last(Run(TINY, layout(shard=count)), count, replays=(), suspected=SPIKE)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.OWN_DOING, ())


def test_kernels_that_vary_on_all_ranks_blame_nobody() -> None:
    verdict = outcome(last(Run(TINY, DP2, alter=_noise_everywhere), 2)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.NOT_DETERMINISTIC, ())


def test_without_deterministic_mode_differences_blame_nobody() -> None:
    run = Run(TINY, DP3, alter=_noise_on_the_last, deterministic=False)
    verdict = outcome(last(run, 3)).verdict
    assert (verdict.kind, verdict.ranks) == (Kind.NOT_DETERMINISTIC, ())


def test_two_thousand_clean_steps_raise_nothing() -> None:
    training = Training(Run(TINY, micro_batches=1))
    replayed = 0
    for step in range(2000):
        done = training.step(step, replay=step % 50 == 0)
        assert done.finding is None
        if done.outcome is not None:
            replayed += 1
            assert done.outcome.verdict.kind is Kind.CLEAN
    assert replayed == 40


def test_a_hundred_clean_steps_on_two_ranks_with_partners_raise_nothing() -> None:
    run = Run(TINY_MOE, DP2, micro_batches=1)
    for results in ranks.run(steps, 2, run, range(100), range(0, 100, 5)):
        assert all(done.finding is None for done in results)
        verdicts = [done.outcome.verdict for done in results if done.outcome is not None]
        assert len(verdicts) == 20
        assert all(v.kind is Kind.CLEAN and v.evidence["partner_test"] for v in verdicts)


def _every_time(rank: int) -> Order:
    return Order(MATMUL, rank, step=2, layer=1, segment=Segment.ATTENTION, bit=20, element=7, persistent=True)


def _flip_in_the_replay(parts: Any, world: Any) -> None:
    calls = iter(range(1000))
    # Two micro-batches a step: step 2 begins with call 4, its replay with call 6.
    _change(parts, lambda out: flip_bit(out, 3, 9) if next(calls) == 6 and world.rank == 1 else out)


def _noise_on_the_last(parts: Any, world: Any) -> None:
    if world.rank == world.size - 1:
        _noise_everywhere(parts, world)


def _noise_everywhere(parts: Any, world: Any) -> None:
    generator = torch.Generator().manual_seed(world.rank)
    _change(parts, lambda out: out * (1 + 1e-3 * torch.rand(out.shape, generator=generator)))


def _change(parts: Any, change: Any) -> None:
    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + (change(out.detach()) - out.detach())

    # Before the guard's own hook on the attention, as a kernel's fault would be.
    parts[0].layers["0"].attention.o.register_forward_hook(hook)
