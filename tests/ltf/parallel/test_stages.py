"""Cutting a model into pipeline stages, and what the schedules can run."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ltf.config.schema import PipelineSchedule
from ltf.model.args import ModelArgs, ModelArgsError, MoEArgs, Stage
from ltf.model.count import token_flops
from ltf.parallel import stages
from ltf.parallel.stages import StagesError
from tests.ltf import ranks
from tests.ltf.model.shapes import COUNTED, DENSE

ONE, LOOPS, ZERO = PipelineSchedule
SEQUENCE = 64


@st.composite
def models(draw: st.DrawFn) -> ModelArgs:
    layers = draw(st.integers(1, 9))
    dense = draw(st.integers(0, layers))
    moe = None
    if dense < layers:
        top_k = tuple(draw(st.lists(st.integers(1, 8), min_size=layers - dense, max_size=layers - dense)))
        moe = MoEArgs(8, top_k, draw(st.integers(1, 400)), dense_layers=dense, renormalise=False)
    vocabulary = draw(st.sampled_from([16, 1000, 100_000]))
    return replace(DENSE, layers=layers, moe=moe, vocab_size=vocabulary, ffn_width=draw(st.integers(1, 900)))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelArgs, int, int, PipelineSchedule]:
    args, schedule = draw(models()), draw(st.sampled_from(PipelineSchedule))
    per_rank = 1 if schedule is ONE else draw(st.integers(1, min(3, args.layers)))
    return args, draw(st.integers(1, args.layers // per_rank)), per_rank, schedule


def in_order(held: list[tuple[Stage, ...]]) -> list[Stage]:
    return sorted((stage for own in held for stage in own), key=lambda stage: stage.layers)


@given(cuts())
def test_each_layer_is_in_one_stage_in_order_and_the_ends_are_where_they_belong(
    cut: tuple[ModelArgs, int, int, PipelineSchedule],
) -> None:
    args, pipeline, per_rank, schedule = cut
    held = stages.stages(args, pipeline, per_rank, schedule, sequence=SEQUENCE)
    assert [len(own) for own in held] == [per_rank] * pipeline
    whole = in_order(held)
    assert [layer for stage in whole for layer in stage.layers] == list(range(args.layers))
    assert all(stage.layers for stage in whole)
    assert [stage.embed for stage in whole] == [True] + [False] * (len(whole) - 1)
    assert [stage.head for stage in whole] == [False] * (len(whole) - 1) + [True]
    numbers = stages.placement(pipeline, per_rank, schedule)
    assert [[whole.index(stage) for stage in own] for own in held] == [list(own) for own in numbers]


@given(cuts())
def test_no_other_cut_has_a_cheaper_slowest_stage_nor_then_a_more_even_one(
    cut: tuple[ModelArgs, int, int, PipelineSchedule],
) -> None:
    args, pipeline, per_rank, schedule = cut

    def cost(ends: tuple[int, ...]) -> tuple[float, float]:
        bounds = [0, *ends, args.layers]
        parts = [Stage(tuple(range(a, b)), embed=a == 0, head=b == args.layers) for a, b in pairwise(bounds)]
        flops = [stages.stage_flops(args, part, SEQUENCE) for part in parts]
        return max(flops), sum(value * value for value in flops)

    found = in_order(stages.stages(args, pipeline, per_rank, schedule, sequence=SEQUENCE))
    ends = tuple(stage.layers[-1] + 1 for stage in found[:-1])
    others = combinations(range(1, args.layers), pipeline * per_rank - 1)
    best = min(cost(other) for other in others)
    assert cost(ends) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("name", COUNTED)
def test_the_stages_of_a_model_cost_together_what_the_model_is_counted_to_cost(name: str) -> None:
    args = COUNTED[name]
    whole = Stage.whole(args)
    expected = token_flops(args, SEQUENCE).forward + args.width
    assert stages.stage_flops(args, whole, SEQUENCE) == pytest.approx(expected, rel=1e-12)


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers() -> None:
    args = replace(DENSE, layers=12)
    even = stages.stages(replace(args, vocab_size=8), 4, 1, ONE, sequence=SEQUENCE)
    assert [len(own[0].layers) for own in even] == [3, 3, 3, 3]
    heavy = stages.stages(replace(args, vocab_size=1000), 4, 1, ONE, sequence=SEQUENCE)
    assert [len(own[0].layers) for own in heavy][-1] == 1


def test_loops_go_round_the_ranks_and_the_v_comes_back() -> None:
    assert stages.placement(2, 1, ONE) == [(0,), (1,)]
    assert stages.placement(2, 3, LOOPS) == [(0, 2, 4), (1, 3, 5)]
    assert stages.placement(3, 2, ZERO) == [(0, 5), (1, 4), (2, 3)]
    assert stages.placement(2, 3, ZERO) == [(0, 2, 4), (1, 3, 5)]


def test_what_cannot_be_cut_is_refused_with_the_numbers() -> None:
    with pytest.raises(StagesError, match=r"4 x stages_per_rank 1 = 4 stages, but the model has 2 layers"):
        stages.stages(DENSE, 4, 1, ONE)
    with pytest.raises(StagesError, match=r"stages_per_rank is 2, but the schedule 1f1b has one"):
        stages.stages(DENSE, 1, 2, ONE)
    with pytest.raises(ModelArgsError, match="tied_embeddings"):
        stages.stages(replace(DENSE, tied_embeddings=True), 2, 1, ONE)


def test_a_schedule_has_its_own_number_of_stages_a_rank_unless_one_is_given() -> None:
    assert [stages.stages_per_rank(None, kind) for kind in (ONE, LOOPS, ZERO)] == [1, 2, 2]
    assert stages.stages_per_rank(3, LOOPS) == 3


def test_the_zero_bubble_schedule_refuses_recomputation_and_compiled_layers() -> None:
    stages.check_features(ONE, 1, recompute=True, compiled=True, balanced=True)
    stages.check_features(LOOPS, 2, recompute=True, compiled=True, balanced=False)
    stages.check_features(ZERO, 2, recompute=False, compiled=False, balanced=True)
    with pytest.raises(StagesError, match="set recompute to none"):
        stages.check_features(ZERO, 2, recompute=True, compiled=False, balanced=False)
    with pytest.raises(StagesError, match="set compile to false"):
        stages.check_features(ZERO, 2, recompute=False, compiled=True, balanced=False)


def test_unlike_numbers_of_micro_batches_need_a_schedule_that_takes_any() -> None:
    stages.check_features(LOOPS, 2, recompute=False, compiled=False, balanced=False)
    for per_rank in (1, 3):
        with pytest.raises(StagesError, match=r"set balance\.mode to static"):
            stages.check_features(ZERO, per_rank, recompute=False, compiled=False, balanced=True)
    with pytest.raises(StagesError, match=r"schedule interleaved and 2 stages a rank"):
        stages.check_features(LOOPS, 2, recompute=False, compiled=False, balanced=True)


Actions = list[tuple[int, str]]


def _made_by_torch(most: int) -> dict[tuple[PipelineSchedule, int, int], Actions | None]:
    """By (schedule, stages a rank, micro-batches): None where torch refuses, else the first rank's
    (stage, kind) of actions on whole stages."""
    dist.init_process_group("gloo")
    made: dict[tuple[PipelineSchedule, int, int], Actions | None] = {}
    for kind in PipelineSchedule:
        for per_rank in (1,) if kind is ONE else (1, 2, 3, 4):
            for count in range(1, most + 1):
                try:
                    schedule = _schedule(kind, per_rank, count)
                except ValueError:
                    made[kind, per_rank, count] = None
                    continue
                actions = getattr(schedule, "pipeline_order_with_comms", {0: []})[0]
                wide = [a for a in actions if a.microbatch_index is None]
                made[kind, per_rank, count] = [(a.stage_index, a.computation_type.value) for a in wide]
    return made


def _schedule(kind: PipelineSchedule, per_rank: int, count: int) -> object:
    pipeline = dist.get_world_size()
    held: list[Any] = [
        PipelineStage(nn.Linear(1, 1), number, pipeline * per_rank, torch.device("cpu"))
        for number in stages.placement(pipeline, per_rank, kind)[dist.get_rank()]
    ]
    if kind is ONE:
        return Schedule1F1B(held[0], count, nn.MSELoss())
    if kind is LOOPS:
        return ScheduleInterleaved1F1B(held, count, nn.MSELoss())
    v = stages.is_v(per_rank, kind)
    return (ScheduleZBVZeroBubble if v else ScheduleInterleavedZeroBubble)(held, count, nn.MSELoss())


@pytest.mark.torch
@pytest.mark.parametrize("pipeline", [2, 3])
def test_the_counts_of_micro_batches_refused_are_those_that_torch_refuses(pipeline: int) -> None:
    made = ranks.run(_made_by_torch, pipeline, 13)[0]
    assert None in made.values()
    for (kind, per_rank, count), actions in made.items():
        if actions is not None:
            stages.check(count, pipeline, kind, per_rank)
        else:
            with pytest.raises(StagesError, match=r"micro-batches a step and rank"):
                stages.check(count, pipeline, kind, per_rank)


@pytest.mark.torch
def test_the_v_gathers_and_reduces_its_stages_in_one_order_whatever_the_number_of_micro_batches() -> None:
    made = ranks.run(_made_by_torch, 2, 13)[0]
    orders = {
        tuple(actions or ()) for (kind, per_rank, _), actions in made.items() if (kind, per_rank) == (ZERO, 2)
    }
    assert orders == {tuple(made[ZERO, 2, 1] or ())}
    assert (
        len({tuple(actions or ()) for (kind, each, _), actions in made.items() if (kind, each) == (LOOPS, 4)})
        > 2
    )


def test_a_step_without_micro_batches_is_refused() -> None:
    with pytest.raises(StagesError, match="no micro-batch"):
        stages.check(0, 2, LOOPS)
