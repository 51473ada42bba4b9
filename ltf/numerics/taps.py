"""Places inside a model where values and gradients can be read, and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltf.model.attention import Attention
from ltf.model.decoder import Decoder
from ltf.model.experts import Experts
from ltf.model.norm import RMSNorm
from ltf.model.router import Router, Routing

OPERATORS = (nn.Linear, RMSNorm, Experts, Router)


class Level(StrEnum):
    """How far inside: every operator, or whole layers (a compiled layer cannot be looked into)."""

    OPERATORS = "operators"
    LAYERS = "layers"


class Tap(Protocol):
    """Sees a tensor under its name as it passes, and returns what the model goes on with."""

    def __call__(self, name: str, x: Tensor) -> Tensor: ...


@dataclass
class Seen:
    """Values (detached) by name in order of execution, and gradients of the loss by them."""

    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    """(tokens, top_k) experts by router: those that its own logits want, whatever was imposed on it."""


class Passing:
    """Changes and keeps nothing: for what the routers would choose."""

    def __init__(self) -> None:
        self.seen = Seen()

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return x


class Watching:
    """Lets everything pass. Each place gets a gradient of its own, also where one tensor has many readers."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.seen.values[name] = x.detach()
        if not x.requires_grad:
            return x
        held = x.view_as(x)
        held.retain_grad()
        self._held[name] = held
        return held

    def finish(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)
        self.seen.gradients = {name: x.grad for name, x in self._held.items()}


class Feeding:
    """Puts the reference's value in place of each, so that no error travels from one operator to the next.

    What comes back through an operator then rests on that operator alone: its output against given
    inputs, and its gradients against given gradients of its output.
    """

    def __init__(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
        self.seen = Seen()
        self._values, self._gradients = values, gradients
        self._raw: dict[str, Tensor] = {}
        self._fed: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.seen.values[name] = x.detach()
        if name not in self._values:
            return x
        if x.requires_grad:
            self._raw[name] = x
        # Cast before it moves: not every device has fp64.
        fed = self._values[name].to(x.dtype).to(x.device).reshape(x.shape).detach()
        self._fed[name] = fed.requires_grad_(x.requires_grad)
        return self._fed[name]

    def finish(self, loss: Tensor) -> None:
        """`loss` has been tapped too; its own gradient is 1."""
        raws, gradients = [], []
        for name, raw in self._raw.items():
            gradient = self._gradients.get(name)
            if gradient is not None:
                raws.append(raw)
                gradients.append(gradient.to(raw.dtype).to(raw.device).reshape(raw.shape))
        torch.autograd.backward(raws, gradients)
        self.seen.gradients = {name: x.grad for name, x in self._fed.items()}


@contextmanager
def tapped(model: Decoder, tap: Tap, seen: Seen, level: Level) -> Iterator[None]:
    """The model's places call `tap` in here. Not for two threads: it replaces functions of torch."""
    with ExitStack() as stack:

        def keep(handle: Any) -> None:
            stack.callback(handle.remove)

        if level is Level.LAYERS:
            for name, module in _layers(model):
                if name != "embed":
                    keep(module.register_forward_pre_hook(_input(f"{name}.in", tap)))
                keep(module.register_forward_hook(_output(f"{name}.out", tap)))
            yield
            return
        inside = _Inside(tap)
        for name, module in model.named_modules():
            if not name or isinstance(module, nn.ModuleDict):
                continue
            if isinstance(module, OPERATORS):
                keep(module.register_forward_pre_hook(_input(f"{name}.in", tap)))
            if isinstance(module, Router | Attention):
                keep(module.register_forward_pre_hook(inside.enter(name, module)))
                keep(module.register_forward_hook(inside.leave, prepend=True))
            if isinstance(module, Router):
                keep(module.register_forward_hook(_routing(name, tap, seen, inside)))
            else:
                keep(module.register_forward_hook(_output(f"{name}.out", tap)))
        stack.enter_context(_replaced("scaled_dot_product_attention", inside.attention))
        stack.enter_context(_replaced("linear", inside.linear))
        yield


class _Inside:
    """Which attention or router is running, for functions that do not know their module."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._name: str | None = None
        self._router: Router | None = None
        self.own: Tensor | None = None

    def enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._name, self.own = name, None
            self._router = module if isinstance(module, Router) else None

        return hook

    def leave(self, *_: Any) -> None:
        self._name = self._router = None

    def attention(self, original: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        if self._name is None or self._router is not None:
            return original(*args, **options)
        q, k, v = (
            self._tap(f"{self._name}.kernel.{letter}", x) for letter, x in zip("qkv", args[:3], strict=True)
        )
        return self._tap(f"{self._name}.kernel.out", original(q, k, v, *args[3:], **options))

    def linear(self, original: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        out = original(*args, **options)
        if self._name is None or self._router is None:
            return out
        # Scores rise with logits, and the balancing bias is zero in a fresh model.
        self.own = out.detach().topk(self._router.top_k, dim=-1).indices
        return self._tap(f"{self._name}.logits", out)


@contextmanager
def routed(routers: Mapping[int, Router], choices: Mapping[int, Tensor]) -> Iterator[None]:
    """Routers choose these experts, (tokens, top_k) by layer, and weigh them by their own scores.

    Through their balancing bias, which decides who is chosen and never how much the chosen count; so it
    works in compiled layers too.
    """
    before = {layer: router.expert_bias for layer, router in routers.items()}
    try:
        for layer, wanted in choices.items():
            router = routers[layer]
            tokens, top_k = wanted.shape
            bias = torch.zeros(
                tokens, router.weight.shape[0], dtype=torch.float32, device=router.weight.device
            )
            order = torch.arange(top_k, 0, -1, dtype=torch.float32, device=bias.device).expand(tokens, -1)
            router.expert_bias = bias.scatter_(1, wanted.to(bias.device), 10 * order)
        yield
    finally:
        for layer, router in routers.items():
            router.expert_bias = before[layer]


def _layers(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    for name in ("embed", "norm", "lm_head"):
        module = getattr(model, name)
        if isinstance(module, nn.Module):
            yield name, module
    for index, layer in model.layers.items():
        yield f"layers.{index}", layer


def _input(name: str, tap: Tap) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return (tap(name, args[0]), *args[1:])

    return hook


def _output(name: str, tap: Tap) -> Callable[..., Any]:
    """Modules return a tensor, or a tensor and statistics."""

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return tap(name, out)
        return (tap(name, out[0]), *out[1:])

    return hook


def _routing(name: str, tap: Tap, seen: Seen, inside: _Inside) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, out: Routing) -> Routing:
        seen.choices[name] = out.experts if inside.own is None else inside.own
        return out._replace(weights=tap(f"{name}.weights", out.weights))

    return hook


@contextmanager
def _replaced(name: str, by: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(F, name)

    def function(*args: Any, **options: Any) -> Tensor:
        return by(original, *args, **options)

    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)
