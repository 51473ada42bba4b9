from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ltf.guard.drill import Fault, Order
from ltf.guard.finite import REPORT_WORDS, Report, attribute
from ltf.guard.point import Phase, Point, Segment
from ltf.parallel.shard import local
from tests.ltf import ranks
from tests.ltf.guard.training import TINY, TINY_MOE, Done, Run, Training, layout, steps

NAN_ACTIVATION, NAN_GRADIENT = Fault.NAN_ACTIVATION, Fault.NAN_GRADIENT
DP2, EP2, PP2 = layout(shard=2), layout(shard=2, expert=2), layout(pipeline=2)
HSDP = layout(replicate=2, shard=1)


def on_ranks(run: Run, count: int, **options: Any) -> list[Done]:
    """The last step's result on each rank, after that all ranks have found the same."""
    results = [done[-1] for done in ranks.run(_steps, count, run, options)]
    assert all(result.finding == results[0].finding for result in results)
    return results


def _steps(run: Run, options: dict[str, Any]) -> Any:
    return steps(run, **{"numbers": [0, 1], **options})


def test_a_clean_step_is_no_finding_and_sees_every_segment() -> None:
    training = Training(Run(TINY_MOE))
    done = training.step(0, replay=True)
    assert done.finding is None
    seen = {(p.phase, p.segment) for p in training.watch.record.digests}
    forward = {
        Segment.EMBED,
        Segment.ATTENTION,
        Segment.ROUTER,
        Segment.EXPERTS_IN,
        Segment.EXPERTS,
        Segment.FFN,
    }
    assert seen >= {(Phase.FORWARD, s) for s in forward | {Segment.HEAD}}
    assert seen >= {(Phase.BACKWARD, s) for s in forward - {Segment.ROUTER}}
    assert {p.micro_batch for p in training.watch.record.digests if p.phase is Phase.FORWARD} == {0, 1}


@pytest.mark.parametrize("segment", ["attention", "router", "experts", "ffn"])
def test_one_rank_alone_names_the_segment(segment: str) -> None:
    order = Order(NAN_ACTIVATION, rank=0, step=1, layer=1, segment=Segment[segment.upper()])
    done = steps(Run(TINY_MOE, orders=(order,)), [0, 1, 2])
    assert [d.finding is None for d in done] == [True, False, True]
    finding = done[1].finding
    assert finding.kind == "finite.activation"
    assert finding.ranks == (0,)
    origin = finding.evidence["origins"]["0"]
    assert (origin["layer"], origin["segment"], origin["micro_batch"]) == (1, segment, 0)


def test_recomputed_layers_are_seen_once_and_faults_in_them_are_named() -> None:
    order = Order(NAN_ACTIVATION, rank=0, step=1, layer=1, segment=Segment.ATTENTION)
    records = []
    for again in (False, True):
        training = Training(Run(recompute=again))
        training.step(0, replay=True)
        training.world.close()
        records.append(training.watch.record)
    assert records[0] == records[1]
    finding = steps(Run(recompute=True, orders=(order,)), [1])[0].finding
    assert finding.evidence["origins"]["0"]["maker"] == "layer 1 attention"


def test_a_compiled_layer_is_seen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as ever, but without minutes of code generation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))

    def spoil(parts: Any, _: Any) -> None:
        parts[0].layers["1"].attention.o.weight.data[0, 0] = math.nan

    training = Training(Run(compiled=True, alter=spoil))
    done = training.step(0)
    first = done.reports[0].first
    assert first == Point(Phase.FORWARD, 0, 1, Segment.BLOCK)


@pytest.mark.parametrize("parallel", [DP2, HSDP], ids=["fsdp", "hsdp with one shard"])
def test_the_rank_that_made_a_nan_activation_is_named_among_data_ranks(parallel: Any) -> None:
    order = Order(NAN_ACTIVATION, rank=1, step=1, layer=0, segment=Segment.FFN)
    (first, _) = on_ranks(Run(TINY, parallel, orders=(order,)), 2)
    assert first.finding is not None
    assert first.finding.ranks == (1,)
    assert "rank 1 made it: layer 0 feed-forward network" in first.finding.message
    assert (
        "finite inputs and non-finite outputs in the forward pass of micro-batch 0" in first.finding.message
    )


def test_a_rank_that_received_nan_from_experts_elsewhere_is_a_victim() -> None:
    order = Order(NAN_ACTIVATION, rank=0, step=1, layer=1, segment=Segment.EXPERTS, persistent=True)
    results = on_ranks(Run(TINY_MOE, EP2, orders=(order,)), 2)
    assert all(report.first is not None for report in results[0].reports)
    finding = results[0].finding
    assert finding is not None
    assert finding.ranks == (0,)
    assert finding.evidence["origins"]["0"]["maker"] == "layer 1 experts"


def test_a_stage_that_received_nan_from_the_stage_before_is_a_victim() -> None:
    run = Run(TINY, PP2, orders=(Order(NAN_ACTIVATION, rank=0, step=1, layer=0, segment=Segment.FFN),))
    results = on_ranks(run, 2)
    assert all(report.first is not None for report in results[0].reports)
    assert results[0].finding is not None
    assert results[0].finding.ranks == (0,)


def test_a_stage_that_received_a_nan_gradient_from_the_stage_after_is_a_victim() -> None:
    run = Run(TINY, PP2, orders=(Order(NAN_GRADIENT, rank=1, step=1, layer=1, segment=Segment.ATTENTION),))
    results = on_ranks(run, 2)
    finding = results[0].finding
    assert finding is not None
    assert finding.kind == "finite.gradient"
    assert finding.ranks == (1,)
    assert "layer 1 feed-forward network took finite gradients" in finding.message


@pytest.mark.parametrize("parallel", [DP2, HSDP, EP2], ids=["fsdp", "hsdp with one shard", "ep"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_nan_gradient_is_seen_before_the_reduction_spreads_it(parallel: Any, layer: int) -> None:
    args = TINY_MOE if parallel.expert > 1 else TINY
    (first, _) = on_ranks(Run(args, parallel, orders=(Order(NAN_GRADIENT, rank=1, step=1, layer=layer),)), 2)
    assert first.finding is not None
    assert first.finding.kind == "finite.gradient"
    assert first.finding.ranks == (1,)
    assert any(not gradient.isfinite().all() for gradient in first.gradients)


def _spoil_weights(parts: Any, world: Any) -> None:
    for part in parts:
        with torch.no_grad():
            local(part.layers["0"].attention.o.weight).fill_(math.nan)


def test_weights_that_are_nan_everywhere_blame_no_rank() -> None:
    (first, _) = on_ranks(Run(TINY, DP2, alter=_spoil_weights), 2, numbers=[0])
    assert first.finding is not None
    assert first.finding.kind == "finite.parameters"
    assert first.finding.ranks == ()


def test_weights_that_are_nan_in_one_shard_reach_all_and_blame_no_rank() -> None:
    (first, _) = on_ranks(Run(TINY, DP2, alter=_spoil_one_shard), 2, numbers=[0])
    assert first.finding is not None
    assert first.finding.ranks == ()
    assert first.finding.evidence["held_by"] == [1]


def _spoil_one_shard(parts: Any, world: Any) -> None:
    if world.rank == 1:
        _spoil_weights(parts, world)


HERE = Point(Phase.FORWARD, 2, 7, Segment.EXPERTS)


def test_several_units_that_fail_at_the_same_place_blame_no_rank() -> None:
    found = attribute(5, [Report(HERE), Report(replace(HERE, micro_batch=0))], [0, 1], layers=12)
    assert found is not None
    assert found.ranks == ()
    assert "no rank is named" in found.message


def test_the_message_says_who_what_and_when() -> None:
    reports = [Report() for _ in range(4)]
    reports[3] = Report(HERE)
    found = attribute(5, reports, [0, 1, 2, 3], layers=12)
    assert found is not None
    assert found.message == (
        "rank 3 made it: layer 7 experts had finite inputs and non-finite outputs in the forward pass of "
        "micro-batch 2"
    )


def test_rows_spoiled_on_the_way_to_an_expert_blame_no_rank() -> None:
    arrived = Report(replace(HERE, segment=Segment.EXPERTS_IN))
    found = attribute(5, [arrived, Report()], [0, 0], layers=12, expert=2)
    assert found is not None
    assert found.ranks == ()
    assert "lost on the way" in found.message


def test_a_norm_that_overflows_in_the_reduction_is_a_finding_without_a_rank() -> None:
    found = attribute(5, [Report(), Report()], [0, 1], layers=12, norm=math.inf)
    assert found is not None
    assert (found.kind, found.ranks) == ("finite.reduction", ())
    assert attribute(5, [Report(), Report()], [0, 1], layers=12, norm=3.0) is None


def test_a_report_survives_the_gather() -> None:
    for report in (Report(), Report(HERE, loss=True), Report(None, loss=True, state=True)):
        assert len(report.words()) == REPORT_WORDS
        assert Report.of(report.words()) == report
