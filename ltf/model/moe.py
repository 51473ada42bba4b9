"""A mixture-of-experts feed-forward layer: route, hand the tokens to their experts, take the results back."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltf.model.args import ModelArgs
from ltf.model.experts import Experts
from ltf.model.mlp import SwiGLU
from ltf.model.router import Router, Routing, RoutingStats


class TokenExchange(Protocol):
    """How tokens reach the experts that this process holds; expert parallelism has its own."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """x (tokens, width) -> (tokens, width): over a token's experts, the sum of weight times output."""
        ...


class MoE(nn.Module):
    """Routed experts plus, if any, the shared ones. `exchange` decides where the experts run."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        moe = args.moe
        if moe is None:
            raise ValueError(f"layer {layer} has no experts in this model")
        self.router = Router(args.width, moe, args.top_k(layer))
        self.experts = Experts(moe.experts, args.width, moe.expert_width)
        shared = moe.shared_experts * moe.expert_width
        self.shared = SwiGLU(args.width, shared) if shared else None
        self.exchange: TokenExchange = local_exchange

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingStats]:
        """x (batch, sequence, width)."""
        routing = self.router(x)
        out = self.exchange(x.reshape(-1, x.shape[-1]), routing, self.experts).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, routing.stats


def local_exchange(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The exchange of a process that holds all experts."""
    top_k = routing.experts.shape[1]
    order = routing.experts.view(-1).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = gather_copies(x, order, inverse, top_k)
    out = experts(rows, routing.stats.tokens_per_expert)
    return combine(gather_copies(out, inverse, order, 1), routing.weights)


def combine(copies: Tensor, weights: Tensor) -> Tensor:
    """copies (tokens * top_k, width) in token order, weights (tokens, top_k) -> sums (tokens, width)."""
    tokens, top_k = weights.shape
    by_token = copies.view(tokens, top_k, copies.shape[-1])
    return torch.bmm(weights.to(copies.dtype).unsqueeze(1), by_token).squeeze(1)


def gather_copies(x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
    """Row i is row order[i] of x with each of its rows repeated `copies` times; `inverse` undoes `order`.

    Its backward pass gathers too, where torch's would add rows in no fixed order: gradients repeat bit for
    bit.
    """
    gathered: Tensor = _GatherCopies.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return gathered


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse)
        if ctx.copies > 1:
            gradient = gradient.view(-1, ctx.copies, gradient.shape[-1]).sum(1)
        return gradient, None, None, None
