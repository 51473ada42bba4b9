"""Pipelines of real ranks against one rank that holds the whole model.

Tolerances: without data parallelism only the router losses' sums are ordered otherwise; with it gradients
are summed in another order. In fp32 that is a few units in the last place: LOSS (relative), GRADIENT (of the
largest element of the same parameter) and PARAMETER (absolute, with steps of LR) leave ten times that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltf.config.schema import Batch as BatchSettings
from ltf.config.schema import Config, Data, Dtype, Optimizer, Parallel, PipelineSchedule, Precision, Run
from ltf.data.loader import Batch
from ltf.model.args import BalanceLoss, ModelArgs, MoEArgs, Stage
from ltf.model.aux_loss import update_biases
from ltf.model.decoder import Decoder
from ltf.optim import adamw
from ltf.parallel import stages
from ltf.parallel.pipeline import PipelinePasses
from ltf.parallel.shard import DTYPES, build, named_shards
from ltf.parallel.world import World, join
from ltf.passes import Totals
from ltf.train.accumulation import Accumulation
from tests.ltf import ranks
from tests.ltf.model.shapes import DENSE, moe

pytestmark = pytest.mark.torch

LOSS = 2e-6
GRADIENT = 1e-5
PARAMETER = 1e-5
LR = 1e-3
SAMPLES, LENGTH, SEED = 2, 12, 1

ONE, LOOPS, ZERO = PipelineSchedule
DEEP = replace(DENSE, layers=4)
MIXED = replace(
    DEEP,
    moe=MoEArgs(
        experts=8,
        top_k=2,
        expert_width=24,
        dense_layers=1,
        balance_loss=BalanceLoss.BATCH,
        balance_coefficient=0.1,
        z_coefficient=1e-2,
        bias_update_rate=1e-2,
    ),
)
BY_ROW = replace(moe(balance_coefficient=0.1, balance_loss=BalanceLoss.SEQUENCE), layers=4)
MODELS = {"dense": DEEP, "batch balance, z, bias": MIXED, "sequence balance": BY_ROW}

Counts = tuple[tuple[int, ...], ...]
"""For each step, the micro-batches of each data rank."""


@dataclass
class Trained:
    """A rank's shares by step, gradients by (name, step), and parameters after the last step."""

    loss: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    """The held-out way: the loss of the same batch by `evaluate`, before the step."""
    gradients: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)


def config(args: ModelArgs, *, compute: Dtype = Dtype.FP32, **parallel: Any) -> Config:
    return Config(
        run=Run(seed=SEED),
        model=args,
        data=Data(seq_len=LENGTH, mask_boundaries=True),
        batch=BatchSettings(micro=SAMPLES),
        parallel=Parallel(reshard=False, **parallel),
        precision=Precision(compute=compute),
        optimizer=Optimizer(lr=LR, eps=1e-6),
    )


def micro_batches(vocabulary: int, count: int, step: int) -> list[Batch]:
    """Documents of 3 to 8 tokens, then another; a fifth of the labels do not count."""
    draw = torch.Generator().manual_seed(step)
    made = []
    for number in range(count):
        tokens = torch.randint(vocabulary, (SAMPLES, LENGTH + 1), generator=draw)
        ends = torch.randint(3, 9, (SAMPLES, 1), generator=draw)
        documents = (torch.arange(LENGTH) >= ends).long()
        mask = (torch.rand(SAMPLES, LENGTH, generator=draw) > 0.2).long()
        samples = tuple(range(number * SAMPLES, (number + 1) * SAMPLES))
        made.append(Batch(samples, tokens[:, :-1].clone(), tokens[:, 1:].clone(), mask, documents, documents))
    return made


def _steps(
    passes: PipelinePasses | Accumulation, parts: list[Decoder], world: World, counts: Counts, details: bool
) -> Trained:
    args, result = parts[0].args, Trained()
    named = {name: value for part in parts for name, value in named_shards(part)}
    optimizer = adamw(named.items(), Optimizer(lr=LR, eps=1e-6))
    assigned: dict[int, Tensor] = {}
    mine = world.layout.data_rank(world.rank)
    for step, of_ranks in enumerate(counts):
        whole = micro_batches(args.vocab_size, sum(of_ranks), step)
        own = whole[sum(of_ranks[:mine]) : sum(of_ranks[: mine + 1])]
        totals = Totals(
            loss_tokens=sum(int(batch.loss_mask.sum()) for batch in whole),
            tokens=sum(batch.tokens.numel() for batch in whole),
            rows=len(whole) * SAMPLES,
            counts=assigned,
        )
        if details:
            result.before.append(float(passes.evaluate(own, totals)))
        optimizer.zero_grad()
        passed = passes(own, totals)
        result.loss.append(float(passed.loss))
        result.balance.append(float(passed.balance))
        result.z.append(float(passed.z))
        assigned = _over_ranks(passed.counts, world)
        if details:
            result.gradients |= {(name, step): _whole(value.grad) for name, value in named.items()}
        optimizer.step()
        for part in parts:
            if args.moe is not None and args.moe.bias_update_rate > 0:
                update_biases(part.routers(), assigned, args.moe.bias_update_rate)
                result.biases |= {
                    i: r.expert_bias for i, r in part.routers().items() if r.expert_bias is not None
                }
    result.parameters = {name: _whole(value.detach()) for name, value in named.items()}
    return result


def _over_ranks(counts: Any, world: World) -> dict[int, Tensor]:
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, dict(counts), group=world.control)
    total: dict[int, Tensor] = {}
    for one in everywhere:
        for layer, values in one.items():
            total[layer] = total.get(layer, 0) + values
    return total


def _whole(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def _alone(settings: Config, counts: Counts, details: bool = True) -> Trained:
    world = join(settings.parallel)
    model = build(settings.model, Stage.whole(settings.model), world, settings)
    return _steps(Accumulation(model, masked=True), [model], world, counts, details)


def _pipelined(settings: Config, counts: Counts, details: bool = True) -> Trained:
    torch.use_deterministic_algorithms(True)
    world = join(settings.parallel)
    parts = held(settings, world)
    return _steps(passes_of(settings, world, parts), parts, world, counts, details)


def held(settings: Config, world: World) -> list[Decoder]:
    """This rank's stages."""
    parallel = settings.parallel
    per_rank = stages.stages_per_rank(parallel.stages_per_rank, parallel.schedule)
    cut = stages.stages(settings.model, parallel.pipeline, per_rank, parallel.schedule, sequence=LENGTH)
    return [
        build(settings.model, stage, world, settings)
        for stage in cut[world.layout.place(world.rank).pipeline]
    ]


def passes_of(settings: Config, world: World, parts: list[Decoder]) -> PipelinePasses:
    return PipelinePasses(
        parts,
        world.mesh.get_group("pp"),
        world.device,
        schedule=settings.parallel.schedule,
        samples=SAMPLES,
        length=LENGTH,
        dtype=DTYPES[settings.precision.compute],
        masked=True,
    )


def together(trained: list[Trained]) -> Trained:
    """Shares summed over ranks, holdings put together."""
    whole = Trained()
    for name in ("loss", "balance", "z", "before"):
        setattr(whole, name, [sum(parts) for parts in zip(*(getattr(t, name) for t in trained), strict=True)])
    for one in trained:
        whole.gradients |= one.gradients
        whole.parameters |= one.parameters
        whole.biases |= one.biases
    return whole


def alone(args: ModelArgs, counts: Counts, *, details: bool = True) -> Trained:
    """The same steps on one rank that takes every micro-batch; made once for each model and batch."""
    summed = tuple((sum(of_ranks),) for of_ranks in counts)
    key = (args, summed)
    if key not in _REFERENCES:
        (_REFERENCES[key],) = ranks.run(_alone, 1, config(args), summed, details)
    return _REFERENCES[key]


_REFERENCES: dict[tuple[ModelArgs, Counts], Trained] = {}


def check_equal(found: Trained, expected: Trained) -> None:
    for name in ("loss", "balance", "z", "before"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=LOSS), name
    assert found.gradients.keys() == expected.gradients.keys()
    assert found.parameters.keys() == expected.parameters.keys()
    for key, gradient in expected.gradients.items():
        error = float((found.gradients[key] - gradient).abs().max() / gradient.abs().max())
        assert error < GRADIENT, f"gradient of {key[0]} in step {key[1]}: {error}"
    for name, parameter in expected.parameters.items():
        error = float((found.parameters[name] - parameter).abs().max())
        assert error < PARAMETER, f"{name}: {error}"
    assert found.biases.keys() == expected.biases.keys()
    for layer, bias in expected.biases.items():
        assert torch.equal(found.biases[layer], bias), layer


EXPERTS: dict[str, Any] = {"pipeline": 2, "shard": 2, "expert": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], Counts]] = {
    "1f1b": ({"pipeline": 2, "schedule": ONE}, ((4,), (4,), (2,), (6,))),
    "interleaved": ({"pipeline": 2, "schedule": LOOPS}, ((4,), (4,), (1,), (6,))),
    "zero bubble V": ({"pipeline": 2, "schedule": ZERO}, ((4,), (4,), (1,), (5,))),
    "zero bubble": ({"pipeline": 2, "schedule": ZERO, "stages_per_rank": 1}, ((4,), (4,), (1,), (6,))),
    "1f1b of 4": ({"pipeline": 4, "schedule": ONE}, ((4,), (4,), (6,), (6,))),
    "1f1b x 2 shards": ({"pipeline": 2, "shard": 2, "schedule": ONE}, ((3, 3), (3, 3), (2, 4))),
    "interleaved x 2 copies": (
        {"pipeline": 2, "replicate": 2, "shard": 1, "schedule": LOOPS},
        ((2, 2), (2, 4)),
    ),
    "zero bubble V x 2 shards": ({"pipeline": 2, "shard": 2, "schedule": ZERO}, ((3, 3), (3, 3), (1, 5))),
    "1f1b x 2 experts": (EXPERTS | {"schedule": ONE}, ((3, 3), (3, 3), (2, 2))),
    "zero bubble V x 2 experts": (EXPERTS | {"schedule": ZERO}, ((3, 3), (2, 2))),
    "interleaved x 2 experts": (EXPERTS | {"schedule": LOOPS}, ((4, 4), (2, 2))),
}
CASES = [
    *((layout, "batch balance, z, bias") for layout in LAYOUTS),
    *((layout, "dense") for layout in ("1f1b", "zero bubble V", "1f1b of 4", "interleaved x 2 copies")),
    *((layout, "sequence balance") for layout in ("interleaved", "zero bubble V x 2 experts")),
]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_pipeline_trains_as_one_rank_does_also_when_the_micro_batches_change(
    layout: str, model: str
) -> None:
    parallel, counts = LAYOUTS[layout]
    settings = config(MODELS[model], **parallel)
    trained = together(ranks.run(_pipelined, world_of(settings), settings, counts))
    check_equal(trained, alone(MODELS[model], counts))


def world_of(settings: Config) -> int:
    shard = settings.parallel.shard
    return settings.parallel.pipeline * settings.parallel.replicate * (1 if shard == "rest" else shard)


def test_the_losses_of_fifty_steps_agree_with_those_of_one_rank() -> None:
    """Rounding grows with the steps: 1e-4 relative."""
    counts = ((2, 2),) * 50
    settings = config(BY_ROW, **EXPERTS, schedule=ZERO)
    trained = together(ranks.run(_pipelined, 4, settings, counts, False))
    expected = alone(BY_ROW, counts, details=False)
    for name in ("loss", "balance"):
        assert getattr(trained, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_bf16_passes_between_stages_and_gradients_add_up_in_fp32_as_on_one_rank(
    schedule: PipelineSchedule,
) -> None:
    counts = ((4,), (6,))
    settings = config(DEEP, compute=Dtype.BF16, pipeline=2, schedule=schedule)
    trained = together(ranks.run(_pipelined, 2, settings, counts))
    (expected,) = ranks.run(_alone, 1, config(DEEP, compute=Dtype.BF16), counts)
    assert trained.loss == pytest.approx(expected.loss, rel=LOSS)
    for key, gradient in expected.gradients.items():
        assert torch.equal(trained.gradients[key], gradient), key


@pytest.mark.parametrize("schedule", [LOOPS, ZERO])
def test_the_same_run_again_has_the_same_bits(schedule: PipelineSchedule) -> None:
    settings = config(MIXED, pipeline=2, shard=2, schedule=schedule)
    runs = [ranks.run(_pipelined, 4, settings, ((2, 2), (4, 4))) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert (first.loss, first.balance, first.z) == (second.loss, second.balance, second.z)
        assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)
        assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


@pytest.mark.parametrize("schedule", [ONE, LOOPS])
def test_layers_that_are_computed_again_in_the_backward_pass_change_nothing(
    schedule: PipelineSchedule,
) -> None:
    counts = ((2, 2), (4, 4))
    settings = config(MIXED, pipeline=2, shard=2, schedule=schedule, recompute="block")
    check_equal(together(ranks.run(_pipelined, 4, settings, counts)), alone(MIXED, counts))


def _shares(settings: Config) -> tuple[float, float, list[int]]:
    world = join(settings.parallel)
    passes = passes_of(settings, world, held(settings, world))
    passed = passes(micro_batches(97, 2, 0), Totals(40, 48, 4, {}))
    return float(passed.loss), float(passed.balance), sorted(passed.counts)


def test_only_the_rank_with_the_last_stage_has_a_share_of_the_cross_entropy() -> None:
    down = ranks.run(_shares, 2, config(MIXED, pipeline=2, schedule=ONE))
    assert [loss > 0 for loss, _, _ in down] == [False, True]
    v = ranks.run(_shares, 2, config(BY_ROW, pipeline=2, schedule=ZERO))
    assert [loss > 0 for loss, _, _ in v] == [True, False]
    assert [layers for _, _, layers in v] == [[0, 3], [1, 2]]
    assert all(balance > 0 for _, balance, _ in v)


def _refused(settings: Config, count: int, length: int) -> str:
    world = join(settings.parallel)
    passes = passes_of(settings, world, held(settings, world))
    batches = micro_batches(97, count, 0)
    batches = [replace(batch, tokens=batch.tokens[:, :length]) for batch in batches]
    try:
        passes(batches, Totals(1, 1, 1, {}))
    except ValueError as error:
        return str(error)
    return ""


def test_micro_batches_that_the_schedule_cannot_take_are_refused_by_every_rank_at_once() -> None:
    for message in ranks.run(_refused, 2, config(DEEP, pipeline=2, schedule=ONE), 1, LENGTH):
        assert "needs at least 2 micro-batches a step and rank, and there are 1" in message
    for message in ranks.run(_refused, 2, config(DEEP, pipeline=2, schedule=LOOPS), 5, LENGTH):
        assert "5 does not divide by 2: give each rank 4 or 6" in message
    for message in ranks.run(_refused, 2, config(DEEP, pipeline=2, schedule=LOOPS), 4, LENGTH - 1):
        assert "a micro-batch of (2, 11) tokens: the pipeline is made for (2, 12)" in message


def _one_raises(settings: Config, store: str) -> tuple[str, float]:
    meeting = dist.FileStore(store, 2)  # type: ignore[attr-defined]
    world = join(settings.parallel)
    parts = held(settings, world)
    passes = passes_of(settings, world, parts)
    batches, totals = micro_batches(97, 4, 0), Totals(40, 96, 8, {})
    passes(batches, totals)
    if world.rank == 1:
        parts[-1].register_forward_pre_hook(_out_of_order)
    began = time.monotonic()
    try:
        passes(batches, totals)
    except RuntimeError as error:
        cause = str(error.__cause__ or error)
        # The rank that raised stays, as one that hangs would: the others learn it by the timeout alone.
        meeting.set(f"seen {world.rank}", "1")
        meeting.wait([f"seen {1 - world.rank}"], timedelta(seconds=30))
        return cause, time.monotonic() - began
    return "", 0.0


def _out_of_order(*_: Any) -> None:
    raise RuntimeError("the stage broke")


@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_a_stage_that_raises_holds_the_others_no_longer_than_the_timeout(
    schedule: PipelineSchedule, tmp_path: Path
) -> None:
    settings = config(DEEP, pipeline=2, schedule=schedule, timeout_seconds=2.0)
    (waited, seconds), (raised, _) = ranks.run(_one_raises, 2, settings, str(tmp_path / "meeting"))
    assert raised == "the stage broke"
    assert "imed out" in waited
    assert 1.0 < seconds < 10.0


def _wrong_parts(settings: Config) -> str:
    world = join(settings.parallel)
    try:
        passes_of(settings, world, of_the_other_rank(settings, world))
    except ValueError as error:
        return str(error)
    return ""


def of_the_other_rank(settings: Config, world: World) -> list[Decoder]:
    cut = stages.stages(settings.model, 2, 1, ONE)
    return [Decoder(settings.model, stage) for stage in cut[1 - world.rank]]


def test_stages_of_another_rank_are_refused() -> None:
    messages = ranks.run(_wrong_parts, 2, config(DEEP, pipeline=2, schedule=ONE))
    assert all("are not stage" in message for message in messages)
