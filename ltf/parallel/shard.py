"""A model, or a pipeline stage of one, as a rank holds it: experts divided, the rest sharded, values in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from ltf.config.schema import Config, Dtype, Exchange, Recompute
from ltf.model.args import ModelArgs, Stage
from ltf.model.decoder import Block, Decoder
from ltf.model.experts import Experts
from ltf.model.moe import MoE, TokenExchange
from ltf.parallel.exchange import Elsewhere, FlatExchange
from ltf.parallel.layout import LayoutError
from ltf.parallel.topology import TopologyExchange, node_map
from ltf.parallel.weights import Values, fill, random_values, saved_values
from ltf.parallel.world import World

DTYPES = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16}


def build(
    args: ModelArgs,
    stage: Stage,
    world: World,
    config: Config,
    initial: Values | None = None,
    *,
    exchange: TokenExchange | None = None,
) -> Decoder:
    """The part of the model that this rank trains, with its first values; all ranks call it together.

    Parameters are fp32 and, with more than one data rank or another dtype to compute in, DTensors sharded by
    FSDP2; a rank that holds a stage alone and computes in fp32 gets a plain module. Gradients are summed over
    ranks, not averaged: divide losses by totals of the whole batch. Values equal `init_weights` of the whole
    model bit for bit in every layout.

    `initial`: other first values than the configuration's (`run.seed` or `run.initial_weights`).
    `exchange`: one for all parts of this rank, from `token_exchange`; made here if none.
    LayoutError if experts cannot be divided so; HfError if the initial weights are not of this model.
    """
    with torch.device("meta"):
        model = Decoder(args, stage)
    if world.layout.expert > 1 and args.moe is not None:
        _divide_experts(model, world.mesh["ep"], exchange or token_exchange(world, config))
    for _, block in model.blocks():
        _wrap_forward(block, config)
    if world.layout.data_ranks > 1 or config.precision.compute is not Dtype.FP32:
        _shard(model, world, config)
    model.to_empty(device=world.device)
    if initial is not None:
        fill(model, initial)
    elif config.run.initial_weights is not None:
        with saved_values(config.run.initial_weights, args) as values:
            fill(model, values)
    else:
        fill(model, random_values(args, config.run.seed))
    return model


def set_last(model: nn.Module, last: bool) -> None:
    """Say before each micro-batch's forward pass whether it is the step's last on this rank.

    Where parameters stay gathered for the whole step (`gathers_once`), gradients then add up locally and are
    reduced once, with the last; ranks of different units may so run different numbers of micro-batches, at
    least one each. Otherwise gradients are reduced with every one, and all ranks must run equally many.
    """
    if isinstance(model, FSDPModule) and getattr(model, _ONCE):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def settle(model: nn.Module) -> None:
    """Free gathered parameters and forget passes under way; call it outside of a step, on every rank.

    Needed after forward passes without backward ones, as in an evaluation, before anything else is done with
    the model: gathered parameters would keep their old values when the sharded ones change, and FSDP would
    take the passes for the next step's and prefetch in another order than on ranks that ran fewer of them.
    """
    if isinstance(model, FSDPModule) and getattr(model, _RAN, False):
        model.reset_iter_state()


def named_shards(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter as this rank holds it, by its name in the whole model.

    The same objects for the life of the model, also while FSDP puts gathered ones in their place; optimizer
    and checkpoints use these. Not during a step.
    """
    settle(model)
    return list(model.named_parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor that may be sharded; it shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def token_exchange(world: World, config: Config, elsewhere: Elsewhere = nullcontext) -> TokenExchange:
    """What the configuration asks for among the ranks of this rank's expert group; all ranks call it.

    `elsewhere` is entered around what waits for other ranks.
    """
    group = world.mesh.get_group("ep")
    if config.parallel.exchange is Exchange.FLAT:
        return FlatExchange(group, elsewhere)
    ranks: list[int] = torch.distributed.get_process_group_ranks(group)
    nodes = node_map([world.roster[rank].node for rank in ranks])
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    return TopologyExchange(group, nodes, elsewhere, timeout=timeout)


def gathers_once(config: Config) -> bool:
    """Whether parameters are gathered and gradients reduced once a step, not once a micro-batch.

    A pipeline runs micro-batches of different stages in between, and balanced ranks run different numbers of
    them: neither can meet other ranks at every micro-batch.
    """
    return not config.parallel.reshard or config.parallel.pipeline > 1 or config.balance.mode == "auto"


_ONCE = "gathers_once"
_RAN = "ran_forward"
"""Set at the first pass, with which FSDP makes the state that `reset_iter_state` needs."""


def _divide_experts(model: Decoder, mesh: DeviceMesh, exchange: TokenExchange) -> None:
    """Give this rank its consecutive share of each layer's experts."""
    assert model.args.moe is not None
    count, ranks = model.args.moe.experts, mesh.size()
    if count % ranks:
        fits = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise LayoutError(
            f"model.moe.experts {count} does not divide among parallel.expert {ranks} ranks "
            f"({count} = {count // ranks} x {ranks} + {count % ranks}): give expert one of {fits}"
        )
    for _, block in model.blocks():
        if isinstance(block.ffn, MoE):
            block.ffn.exchange = exchange
            for name, whole in list(block.ffn.experts.named_parameters()):
                mine = whole.detach().narrow(0, 0, count // ranks).contiguous()
                divided = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
                setattr(block.ffn.experts, name, nn.Parameter(divided))


def _wrap_forward(block: Block, config: Config) -> None:
    """Recompute or compile inside the module's call, so that names stay and FSDP's hooks remain outside."""
    forward: Callable[..., Any] = block.forward
    if config.parallel.compile:
        forward = torch.compile(forward)
    if config.parallel.recompute is Recompute.BLOCK:
        # Stopping early would leave the experts' hooks, which free their parameters, uncalled. There is no
        # dropout, so no random state to keep.
        forward = partial(
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False, early_stop=False
        )
    if forward is not block.forward:
        block.forward = forward  # type: ignore[method-assign]


def _shard(model: Decoder, world: World, config: Config) -> None:
    compute = DTYPES[config.precision.compute]
    reduce = DTYPES[config.precision.reduce]
    once = gathers_once(config)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    exact = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    common = partial(fully_shard, mesh=world.dense, reshard_after_forward=not once)
    for _, block in model.blocks():
        if isinstance(block.ffn, MoE):
            if compute is not torch.float32:
                common(block.ffn.router, mp_policy=exact)
            if world.layout.expert > 1:
                _shard_experts(block.ffn.experts, world.experts, policy, reshard=not once)
        common(block, mp_policy=policy)
    ends: list[nn.Module] = [module for module in (model.norm, model.lm_head) if module is not None]
    if model.lm_head is not None:
        # The backward pass begins here: what it would free it would gather again at once.
        fully_shard(ends, mesh=world.dense, mp_policy=policy, reshard_after_forward=False)
        if model.embed is not None:
            common(model.embed, mp_policy=policy)
    # The root has what is left: the tied embedding, which both ends of the model use, and the norm.
    root = fully_shard(model, mesh=world.dense, mp_policy=policy, reshard_after_forward=False)
    setattr(root, _ONCE, once)
    model.register_forward_pre_hook(lambda module, _: setattr(module, _RAN, True))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_experts(
    experts: Experts, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, reshard: bool
) -> None:
    """By expert where there are enough here for all that share them, else by matrices' rows or columns."""
    shards = mesh.size(-1)
    # The experts' output is a view for the sake of its gradient; no exchange writes to it.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPExperts\) returned a view")

    def placement(parameter: nn.Parameter) -> Shard:
        shape = local(parameter).shape
        fitting = [dim for dim, size in enumerate(shape) if size % shards == 0]
        return Shard(fitting[0] if fitting else 0)

    fully_shard(
        experts,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=reshard,
        shard_placement_fn=placement,
    )
