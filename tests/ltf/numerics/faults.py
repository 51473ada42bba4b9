"""Wrong kernels, each held open around a candidate's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltf.model.decoder import Decoder
from ltf.model.experts import Experts


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


@contextmanager
def function(name: str, by: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(F, name)
    setattr(F, name, lambda *args, **options: by(original, *args, **options))
    try:
        yield
    finally:
        setattr(F, name, original)


@contextmanager
def scaled_attention_gradient(model: Decoder) -> Iterator[None]:
    """Forward right, gradients 5 % too large: no cosine shows it."""

    def attention(original: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        q, k, v = (_ScaledGradient.apply(x, 1.05) for x in (q, k, v))  # type: ignore[no-untyped-call]
        return original(q, k, v, **options)

    with function("scaled_dot_product_attention", attention):
        yield


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def biased_layer_norm(model: Decoder) -> Iterator[None]:
    """Adds 0.15 to what has unit scale."""
    norm = dict(model.named_modules())["layers.1.attention_norm"]
    with hooked(norm, lambda _, args, out: out + 0.15):
        yield


@contextmanager
def dropped_columns(model: Decoder) -> Iterator[None]:
    """A matrix product that leaves out the last 2 of its inner dimension: a kernel without a tail."""
    product = dict(model.named_modules())["layers.0.attention.o"]
    assert isinstance(product, nn.Linear)
    weight = product.weight
    with hooked(product, lambda _, args, out: F.linear(args[0][..., :-2], weight[:, :-2])):
        yield


@contextmanager
def router_in_bf16(model: Decoder) -> Iterator[None]:
    """Logits in the precision of the model around the router."""
    experts = model.args.moe.experts if model.args.moe else 0

    def linear(original: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight.shape[0] != experts:
            return original(x, weight, *rest)
        return original(x.bfloat16(), weight.bfloat16()).float()

    with function("linear", linear):
        yield


@contextmanager
def dropped_expert(model: Decoder) -> Iterator[None]:
    """The tokens of one expert of the second layer get nothing."""
    experts = dict(model.named_modules())["layers.1.ffn.experts"]
    assert isinstance(experts, Experts)

    def drop(_: nn.Module, args: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        kept = torch.ones_like(out)
        kept[: int(args[1][0])] = 0
        return out * kept

    with hooked(experts, drop):
        yield


@contextmanager
def drifting_router(model: Decoder) -> Iterator[None]:
    """Right at first: the first two passes have no error, each later one has more."""
    calls = 0

    def linear(original: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        out = original(x, weight, *rest)
        if model.args.moe is None or weight.shape[0] != model.args.moe.experts:
            return out
        calls += 1
        drift = 0.1 * max(0, calls - 2 * model.args.layers)
        return out + drift * torch.linspace(-1, 1, out.shape[-1])

    with function("linear", linear):
        yield


@contextmanager
def infinite_activation(model: Decoder) -> Iterator[None]:
    with hooked(dict(model.named_modules())["layers.0.ffn_norm"], lambda _, args, out: out * float("nan")):
        yield
