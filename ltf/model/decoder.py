"""The decoder, whole or the part of it that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltf.model.args import ModelArgs, Stage
from ltf.model.attention import Attention, document_mask
from ltf.model.mlp import SwiGLU
from ltf.model.moe import MoE
from ltf.model.norm import RMSNorm
from ltf.model.rope import positions_in_documents, rope_table
from ltf.model.router import Router, RoutingStats


class DecoderOutput(NamedTuple):
    """`out`: logits (batch, sequence, vocabulary), or hidden states of a part without the head.

    `routing`: what the routers did, by layer index.
    """

    out: Tensor
    routing: dict[int, RoutingStats]


class Decoder(nn.Module):
    """Parameters hold no values until `init_weights` or `hf.load` fills them; it can be made on meta.

    Layers are keyed by their index in the whole model, so a stage's parameters keep their names. Each layer
    may be wrapped for sharding or recomputation by itself: a function of its inputs, also in what it reports.
    Recompute with `use_reentrant=False`: the other kind loses the gradients of the router losses.
    """

    def __init__(self, args: ModelArgs, stage: Stage | None = None) -> None:
        super().__init__()
        stage = stage or Stage.whole(args)
        stage.check(args)
        self.args = args
        self.stage = stage
        self.embed = nn.Embedding(args.vocab_size, args.width, _weight=_empty(args)) if stage.embed else None
        self.layers = nn.ModuleDict({str(i): Block(args, i) for i in stage.layers})
        self.norm = RMSNorm(args.width, args.norm_eps) if stage.head else None
        own_head = stage.head and not args.tied_embeddings
        self.lm_head = nn.Linear(args.width, args.vocab_size, bias=False) if own_head else None

    def forward(
        self, x: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
    ) -> DecoderOutput:
        """x: tokens (batch, sequence); of a part without embedding, hidden states (batch, sequence, width).

        `document_ids` (batch, sequence): attention stays inside runs of one id, and positions begin again
        with each. `positions` (batch, sequence) overrides them.
        """
        mask = None if document_ids is None else document_mask(document_ids)
        if positions is None and document_ids is not None:
            positions = positions_in_documents(document_ids)
        elif positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        hidden = x if self.embed is None else self.embed(x)
        rope = rope_table(positions, self.args.head_dim, self.args.rope_theta, hidden.dtype)
        routing: dict[int, RoutingStats] = {}
        for index, layer in self.layers.items():
            hidden, stats = layer(hidden, rope, mask)
            if stats is not None:
                routing[int(index)] = stats
        if self.norm is not None:
            hidden = self._head(self.norm(hidden))
        return DecoderOutput(hidden, routing)

    def _head(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            logits: Tensor = self.lm_head(hidden)
            return logits
        assert self.embed is not None  # Stage.check: a tied head comes with its embedding
        return F.linear(hidden, self.embed.weight)

    def routers(self) -> dict[int, Router]:
        """This part's routers by layer index."""
        return {i: block.ffn.router for i, block in self.blocks() if isinstance(block.ffn, MoE)}

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """This part's layers with their indices in the whole model."""
        for index, layer in self.layers.items():
            assert isinstance(layer, Block)
            yield int(index), layer


class Block(nn.Module):
    """Attention, then the feed-forward network; each reads the normalised residual stream and adds to it."""

    def __init__(self, args: ModelArgs, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.width, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.width, args.norm_eps)
        self.ffn: MoE | SwiGLU
        if args.is_moe(index):
            self.ffn = MoE(args, index)
        else:
            assert args.ffn_width is not None  # ModelArgs: a dense layer comes with its width
            self.ffn = SwiGLU(args.width, args.ffn_width)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, RoutingStats | None]:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            out, stats = self.ffn(normed)
            return x + out, stats
        return x + self.ffn(normed), None


def _empty(args: ModelArgs) -> Tensor:
    return torch.empty(args.vocab_size, args.width)
