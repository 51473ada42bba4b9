"""How many parameters a model has and what a token costs in operations, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from ltf.model.args import ModelArgs


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. `head` is 0 when it is the embedding's matrix (tied)."""

    embedding: int
    head: int
    norms: int
    attention: int
    dense: int
    routers: int
    shared_experts: int
    experts: int
    chosen_experts: int
    """Of `experts`, those that one token passes through."""

    @property
    def total(self) -> int:
        return self.active + self.experts - self.chosen_experts

    @property
    def active(self) -> int:
        """What one token uses: all but the experts it was not sent to. The whole embedding is counted."""
        everywhere = self.embedding + self.head + self.norms + self.attention + self.dense
        return everywhere + self.routers + self.shared_experts + self.chosen_experts


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token's forward pass; a multiplication and its addition count as two.

    `matmul`: 2 for each weight of every matrix the token meets, the head included, the embedding's look-up
    not. `attention`: 4 * heads * head_dim a layer for each position looked at (scores, then values). Norms,
    activations and softmax are left out; so is recomputation, so a rate from this is MFU, not HFU.
    """

    matmul: float
    attention: float

    @property
    def forward(self) -> float:
        return self.matmul + self.attention

    @property
    def training(self) -> float:
        """Forward plus backward, which costs twice the forward."""
        return 3 * self.forward


def count_parameters(args: ModelArgs) -> ParameterCount:
    """Exactly the parameters that `decoder.Decoder(args)` has; buffers are not counted."""
    moe, width = args.moe, args.width
    sparse = len(args.moe_layers)
    per_head = args.width * args.head_dim
    expert = 0 if moe is None else 3 * width * moe.expert_width
    return ParameterCount(
        embedding=args.vocab_size * width,
        head=0 if args.tied_embeddings else args.vocab_size * width,
        norms=width + args.layers * (2 * width + (2 * args.head_dim if args.qk_norm else 0)),
        attention=args.layers * per_head * 2 * (args.heads + args.kv_heads),
        dense=(args.layers - sparse) * 3 * width * (args.ffn_width or 0),
        routers=0 if moe is None else sparse * width * moe.experts,
        shared_experts=0 if moe is None else sparse * moe.shared_experts * expert,
        experts=0 if moe is None else sparse * moe.experts * expert,
        chosen_experts=sum(args.top_k(layer) for layer in args.moe_layers) * expert,
    )


def token_flops(args: ModelArgs, sequence: int, *, causal: bool = True) -> TokenFlops:
    """The mean over the tokens of one sequence of `sequence` tokens.

    Causal: a token looks at (sequence + 1) / 2 positions on average, what an ideal kernel computes; otherwise
    at all of them, as some published rates count. Documents masked inside the sequence make the true cost
    lower.
    """
    count = count_parameters(args)
    matrices = count.active - count.norms - count.embedding - count.head + args.vocab_size * args.width
    positions = (sequence + 1) / 2 if causal else sequence
    return TokenFlops(
        matmul=2.0 * matrices,
        attention=4.0 * args.layers * args.heads * args.head_dim * positions,
    )
