"""Which layers each pipeline rank holds, and how many micro-batches a schedule can take.

The cost of a part is its forward pass in floating-point operations a token (`model.count.TokenFlops`; the
backward pass costs twice that everywhere): 2 for each weight that a token meets, the chosen experts alone of
a mixture, plus attention over half of the sequence. The head counts as the product it is, 2 * vocabulary *
width, which in a small model is several layers; the embedding as the `width` elements that it copies. The
slowest stage sets the pace, so the cut makes the largest cost as small as it can be.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import inf

from ltf.config.schema import PipelineSchedule
from ltf.model.args import ModelArgs, Stage


class StagesError(ValueError):
    """The model cannot be cut so, or the schedule cannot run so. One line: what is wrong and what to do."""


def stages(
    args: ModelArgs,
    pipeline: int,
    per_rank: int,
    schedule: PipelineSchedule,
    *,
    sequence: int | None = None,
) -> list[tuple[Stage, ...]]:
    """Each pipeline rank's stages, in the order of the model.

    `sequence`: tokens in a sample, which attention's cost follows; none: `args.max_positions`. Raises
    StagesError, and ModelArgsError where embedding and head are tied, which needs both in one stage.
    """
    check_shape(args.layers, pipeline, per_rank, schedule)
    cuts = _split(args, pipeline * per_rank, sequence or args.max_positions)
    last = len(cuts) - 1
    whole = [Stage(tuple(cut), embed=i == 0, head=i == last) for i, cut in enumerate(cuts)]
    for stage in whole:
        stage.check(args)
    return [tuple(whole[i] for i in held) for held in placement(pipeline, per_rank, schedule)]


def placement(pipeline: int, per_rank: int, schedule: PipelineSchedule) -> list[tuple[int, ...]]:
    """Numbers of the stages that each pipeline rank holds.

    Loops: rank r has stages r, r + pipeline and so on. The zero-bubble schedule with two stages a rank goes
    down and up again as a V (arXiv 2401.10241, section 6): the first rank has the first and the last stage.
    """
    if is_v(per_rank, schedule):
        return [(rank, 2 * pipeline - 1 - rank) for rank in range(pipeline)]
    return [tuple(range(rank, pipeline * per_rank, pipeline)) for rank in range(pipeline)]


def is_v(per_rank: int, schedule: PipelineSchedule) -> bool:
    """Whether stages lie as a V rather than in loops."""
    return schedule is PipelineSchedule.ZERO_BUBBLE and per_rank == 2


def stages_per_rank(asked: int | None, schedule: PipelineSchedule) -> int:
    """What `parallel.stages_per_rank` means: the number asked for, or the schedule's own."""
    if asked is not None:
        return asked
    return 1 if schedule is PipelineSchedule.ONE_F_ONE_B else 2


def check_shape(layers: int, pipeline: int, per_rank: int, schedule: PipelineSchedule) -> None:
    """Raise StagesError unless so many layers can be cut so, and the schedule runs stages so."""
    if schedule is PipelineSchedule.ONE_F_ONE_B and per_rank != 1:
        raise StagesError(
            f"parallel.stages_per_rank is {per_rank}, but the schedule 1f1b has one stage a rank: "
            "leave it out, or set parallel.schedule to interleaved"
        )
    if pipeline * per_rank > layers:
        raise StagesError(
            f"parallel.pipeline {pipeline} x stages_per_rank {per_rank} = {pipeline * per_rank} stages, but "
            f"the model has {layers} layers and each stage needs one: lower either, or raise model.layers"
        )


def check(
    n_microbatches: int, pipeline: int, schedule: PipelineSchedule, per_rank: int | None = None
) -> None:
    """Raise StagesError unless the schedule can run a step of so many micro-batches on each rank.

    1f1b fills the pipeline before its first backward pass. The looping schedules go in rounds of `pipeline`
    micro-batches or more, all rounds as large. The V takes any number. These are torch 2.13's limits.
    """
    if n_microbatches < 1:
        raise StagesError("a step has no micro-batch: raise batch.samples")
    if schedule is PipelineSchedule.ONE_F_ONE_B:
        if n_microbatches < pipeline:
            raise StagesError(
                f"the schedule 1f1b over {pipeline} stages needs at least {pipeline} micro-batches a step "
                f"and rank, and there are {n_microbatches}: raise batch.samples, or lower batch.micro or "
                "parallel.pipeline"
            )
        return
    rounds = max(1, n_microbatches // pipeline)
    if n_microbatches % rounds and not is_v(stages_per_rank(per_rank, schedule), schedule):
        fewer = n_microbatches // pipeline * pipeline
        raise StagesError(
            f"the schedule {schedule} runs {n_microbatches} micro-batches a step and rank over {pipeline} "
            f"ranks in {rounds} rounds, and {n_microbatches} does not divide by {rounds}: give each rank "
            f"{fewer} or {fewer + pipeline} micro-batches (batch.samples, batch.micro)"
        )


def check_features(
    schedule: PipelineSchedule, per_rank: int, *, recompute: bool, compiled: bool, balanced: bool
) -> None:
    """Raise StagesError where these do not go together, as tried with torch 2.13.

    The zero-bubble schedules run a stage's backward pass in two, for its input and for its weights. A
    compiled layer's backward pass is one piece: torch refuses. Recomputation gives right gradients, but anew
    for every group of weights: each layer runs forward 12 or more times. `balanced`: units of ranks run
    unlike numbers of micro-batches. The looping schedules cannot run just any number (`check`), and with four
    stages a rank they gather and free parameters in an order that follows it, where units must agree.
    """
    if schedule is PipelineSchedule.ZERO_BUBBLE and (compiled or recompute):
        name, off = ("compile", "false") if compiled else ("recompute", "none")
        raise StagesError(
            f"parallel.{name} does not go with the schedule zero_bubble, which cuts the backward pass of a "
            f"layer in two: set {name} to {off}, or parallel.schedule to interleaved"
        )
    if balanced and schedule is not PipelineSchedule.ONE_F_ONE_B and not is_v(per_rank, schedule):
        raise StagesError(
            f"balance.mode auto does not go with the schedule {schedule} and {per_rank} stages a rank, which "
            "cannot run just any number of micro-batches: set balance.mode to static, or parallel.schedule "
            "to 1f1b, or to zero_bubble with 2 stages a rank"
        )


def layer_flops(args: ModelArgs, layer: int, sequence: int) -> float:
    """Of one token's forward pass through that layer, in a sequence of so many tokens, causal."""
    weights = args.width * args.head_dim * 2 * (args.heads + args.kv_heads)
    if args.moe is not None and args.is_moe(layer):
        experts = args.top_k(layer) + args.moe.shared_experts
        weights += args.width * args.moe.experts + 3 * args.width * args.moe.expert_width * experts
    else:
        weights += 3 * args.width * (args.ffn_width or 0)
    return 2.0 * weights + 4.0 * args.heads * args.head_dim * (sequence + 1) / 2


def stage_flops(args: ModelArgs, stage: Stage, sequence: int) -> float:
    """A stage's cost as the cut counts it, see above."""
    layers = sum(layer_flops(args, layer, sequence) for layer in stage.layers)
    return layers + stage.embed * args.width + stage.head * 2.0 * args.vocab_size * args.width


def _split(args: ModelArgs, parts: int, sequence: int) -> list[range]:
    """Contiguous parts of at least one layer: the least possible maximum, and among those the most even."""
    costs = [layer_flops(args, layer, sequence) for layer in range(args.layers)]
    costs[0] += args.width
    costs[-1] += 2.0 * args.vocab_size * args.width
    upto = [0.0, *accumulate(costs)]
    largest = _best(upto, parts, max, inf)[0]
    # Sums of floats differ by rounding between two ways to the same cut.
    _, cuts = _best(upto, parts, lambda best, cost: best + cost * cost, largest * (1 + 1e-9))
    return [range(first, end) for first, end in zip([0, *cuts], [*cuts, args.layers], strict=True)]


def _best(
    upto: list[float], parts: int, add: Callable[[float, float], float], limit: float
) -> tuple[float, list[int]]:
    """The cut of the least total, where `add` takes in one part's cost, none above `limit`; its inner ends.

    `upto[i]`: the cost of the first i layers. Among equals the earlier parts are the shorter, since they hold
    more micro-batches' activations.
    """
    layers = len(upto) - 1
    table: list[tuple[float, list[int]] | None] = [(0.0, []), *([None] * layers)]
    for part in range(parts):
        table = [_extended(table, upto, end, part, add, limit) for end in range(layers + 1)]
    best = table[layers]
    assert best is not None  # parts <= layers, and the limit is what some cut reaches
    return best[0], best[1][:-1]


def _extended(
    before: list[tuple[float, list[int]] | None],
    upto: list[float],
    end: int,
    part: int,
    add: Callable[[float, float], float],
    limit: float,
) -> tuple[float, list[int]] | None:
    best: tuple[float, list[int]] | None = None
    for begin in range(part, end):
        so_far, cost = before[begin], upto[end] - upto[begin]
        if so_far is None or cost > limit:
            continue
        total = add(so_far[0], cost)
        if best is None or total < best[0]:
            best = (total, [*so_far[1], end])
    return best
