"""Small models for tests, and a way to make one with values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ltf.model.args import BalanceLoss, InitArgs, InitScheme, ModelArgs, MoEArgs, ScoreFunction
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights

DENSE = ModelArgs(
    vocab_size=97,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_width=48,
    rope_theta=10_000.0,
    init=InitArgs(std=0.1),
)
MOE = replace(DENSE, layers=3, ffn_width=None, moe=MoEArgs(experts=8, top_k=2, expert_width=24))

COUNTED = {
    "dense": DENSE,
    "dense, tied, without qk norm": replace(DENSE, tied_embeddings=True, qk_norm=False),
    "experts everywhere": MOE,
    "experts after a dense layer": replace(
        MOE, ffn_width=48, moe=MoEArgs(experts=8, top_k=2, expert_width=24, dense_layers=1)
    ),
    "experts after a dense layer, one shared": replace(
        MOE,
        ffn_width=48,
        moe=MoEArgs(experts=8, top_k=2, expert_width=24, shared_experts=1, dense_layers=1),
    ),
    "top-k by layer, sigmoid, bias": replace(
        MOE,
        moe=MoEArgs(
            experts=8,
            top_k=(4, 2, 1),
            expert_width=24,
            renormalise=False,
            score=ScoreFunction.SIGMOID,
            bias_update_rate=1e-3,
            balance_loss=BalanceLoss.NONE,
        ),
    ),
    "scaled outputs": replace(DENSE, init=InitArgs(scheme=InitScheme.SCALED_OUTPUT)),
}


def moe(**changes: Any) -> ModelArgs:
    """The MoE shape with some of its `moe` fields changed."""
    assert MOE.moe is not None
    return replace(MOE, moe=replace(MOE.moe, **changes))


def decoder(args: ModelArgs, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(args)
    init_weights(model, seed)
    return model.to(dtype)


def tokens(args: ModelArgs, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(args.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
