"""How much memory a rank needs, by arithmetic: what it keeps, what it gathers, what backward passes wait for.

Not counted, as they depend on device and kernels: the allocator's fragmentation, workspaces of kernels and
collectives, the optimizer's temporaries. Experts are taken to have an even load.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ltf.config.schema import Config, Dtype, PipelineSchedule, Recompute
from ltf.model.args import ModelArgs, Stage
from ltf.parallel.layout import Layout
from ltf.parallel.stages import is_v

FP32 = 4
BYTES = {Dtype.FP32: 4, Dtype.BF16: 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak.

    `parameters`: its shard of the fp32 master copy; `gradients`: the same again; `optimizer`: AdamW's two
    fp32 moments. `gathered`: whole parameters in the compute dtype, while layers run. `unreduced`: whole
    gradients that wait for their reduction. `activations`: what the backward pass needs of all micro-batches
    under way. `logits`: of one micro-batch, with the loss.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    unreduced: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def of_rank(config: Config, layout: Layout, rank: int, stages: tuple[Stage, ...]) -> Memory:
    """Of the pipeline rank `rank` (from 0), which holds these stages; its data ranks need the same."""
    args = config.model
    compute, reduce = BYTES[config.precision.compute], BYTES[config.precision.reduce]
    layers = [_parameters(args, layer) for stage in stages for layer in stage.layers]
    ends = sum(_end_parameters(args, stage) for stage in stages)
    # fully_shard pads what does not divide evenly; that is at most one row of each parameter.
    own = -(-(ends + sum(dense + experts for dense, experts in layers)) // layout.shard)
    whole = [dense + experts // layout.expert for dense, experts in layers]
    sharded = layout.data_ranks > 1 or config.precision.compute is not Dtype.FP32
    passes = micro_batches(config, layout)
    tokens = config.batch.micro * config.data.seq_len
    waits = gathers_once(config) and passes > 1
    return Memory(
        parameters=own * FP32,
        gradients=own * FP32,
        optimizer=own * 2 * FP32,
        gathered=_gathered(whole, ends, once=gathers_once(config)) * compute if sharded else 0,
        unreduced=_unreduced(whole, ends, compute, reduce, waits=waits) if sharded else 0,
        activations=_activations(config, layout, rank, stages, passes),
        logits=logits(args, tokens) if any(stage.head for stage in stages) else 0,
    )


def micro_batches(config: Config, layout: Layout) -> int:
    """Of one step on one data rank, divided evenly."""
    return max(1, config.batch.samples // (config.batch.micro * layout.data_ranks))


def gathers_once(config: Config) -> bool:
    """As `ltf.parallel.shard.gathers_once`, which needs torch: once a step, not once a micro-batch."""
    parallel = config.parallel
    return not parallel.reshard or parallel.pipeline > 1 or config.balance.mode == "auto"


def layer_activations(args: ModelArgs, layer: int, tokens: int, compute: int) -> int:
    """Bytes that the backward pass of one layer keeps for a micro-batch; `compute`: bytes an element.

    The method is that of arXiv 2205.05198, section 4.1: add up what each operation saves, once for each
    storage. A token keeps, in elements: of attention 2 width (input, normalised) + 2 heads + 2 kv_heads of
    head_dim (rotated queries, keys, values, output), with QK norm also heads + kv_heads (what is normalised);
    of the feed-forward 2 width (input, normalised) + 4 hidden (gate and up, silu of the gate, their product).
    A mixture of experts has 4 hidden + 2 width (rows in, rows out) for each chosen expert, and the router's
    fp32 logits and scores. The statistics of norms and attention are fp32, indices 8 bytes. Attention saves
    no scores: a fused kernel computes them again.
    """
    heads = args.heads + args.kv_heads
    elements = 2 * args.width + 2 * heads * args.head_dim
    elements += heads * args.head_dim if args.qk_norm else 0
    small = FP32 * (2 + args.heads + (heads if args.qk_norm else 0))
    elements += 2 * args.width
    moe = args.moe
    if moe is None or not args.is_moe(layer):
        elements += 4 * (args.ffn_width or 0)
        return tokens * (elements * compute + small)
    top_k = args.top_k(layer)
    elements += top_k * (2 * args.width + 4 * moe.expert_width)
    elements += 4 * moe.shared_experts * moe.expert_width
    small += FP32 * (2 * moe.experts + 2 * top_k + 3) + 3 * 8 * top_k
    # The router reads its input in fp32.
    small += 0 if compute == FP32 else FP32 * args.width
    return tokens * (elements * compute + small)


def logits(args: ModelArgs, tokens: int) -> int:
    """Bytes around the loss: the logits and their gradient in the compute dtype, log-probabilities and theirs
    in fp32 (in fp32 the gradient of both is one): 12 bytes a token and entry of the vocabulary either way.
    """
    return 12 * tokens * args.vocab_size


def chunks_in_flight(
    layout: Layout, rank: int, per_rank: int, schedule: PipelineSchedule, passes: int
) -> int:
    """Forward passes of one stage whose backward pass has not come yet, at most; `passes`: micro-batches.

    1F1B: one for each stage from here to the last. Interleaved: 2 (pipeline - rank - 1) + (stages a rank - 1)
    pipeline before the first backward pass, and the one under way (arXiv 2104.04473, section 2.2). The V:
    as 1F1B on its first rank (arXiv 2401.10241, section 6).
    """
    pipeline = layout.pipeline
    if pipeline == 1:
        return per_rank
    if is_v(per_rank, schedule):
        most = 2 * pipeline
    elif schedule is PipelineSchedule.ONE_F_ONE_B:
        most = pipeline - rank
    else:
        most = 2 * (pipeline - rank - 1) + (per_rank - 1) * pipeline + 1
    return min(most, passes * per_rank)


def _activations(config: Config, layout: Layout, rank: int, stages: tuple[Stage, ...], passes: int) -> int:
    args, compute = config.model, BYTES[config.precision.compute]
    tokens = config.batch.micro * config.data.seq_len
    whole = [layer_activations(args, layer, tokens, compute) for stage in stages for layer in stage.layers]
    chunks = chunks_in_flight(layout, rank, len(stages), config.parallel.schedule, passes)
    if config.parallel.recompute is Recompute.BLOCK:
        kept = len(whole) * tokens * args.width * compute * chunks // len(stages) + max(whole)
    else:
        kept = sum(whole) * chunks // len(stages)
    if any(stage.head for stage in stages):
        kept += tokens * (2 * args.width * compute + FP32)
    if config.data.mask_boundaries:
        kept += config.batch.micro * config.data.seq_len**2
    return kept


def _gathered(whole: list[int], ends: int, *, once: bool) -> int:
    """Elements: all, or the layer that runs and the next, which is fetched meanwhile; the ends stay."""
    return ends + (sum(whole) if once else sum(sorted(whole)[-2:]))


def _unreduced(whole: list[int], ends: int, compute: int, reduce: int, *, waits: bool) -> int:
    """Bytes: a layer's gradients and the buffer that reduces them; all, where they wait for the last pass."""
    buffers = (max(whole) + ends) * (compute + reduce)
    return buffers + (sum(whole) + ends) * reduce if waits else buffers


def _parameters(args: ModelArgs, layer: int) -> tuple[int, int]:
    """Of one layer: those that every expert-parallel rank holds, and those divided among them."""
    width, moe = args.width, args.moe
    dense = 2 * width * args.head_dim * (args.heads + args.kv_heads) + 2 * width
    dense += 2 * args.head_dim if args.qk_norm else 0
    if moe is None or not args.is_moe(layer):
        return dense + 3 * width * (args.ffn_width or 0), 0
    dense += width * moe.experts + 3 * width * moe.expert_width * moe.shared_experts
    return dense, 3 * width * moe.expert_width * moe.experts


def _end_parameters(args: ModelArgs, stage: Stage) -> int:
    table = args.vocab_size * args.width
    tied = args.tied_embeddings and stage.embed
    return stage.embed * table + stage.head * (args.width + (0 if tied else table))
