"""Looks into a model's passes: shows what every stretch of computation put out, and the gradients of that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ltf.guard.point import Phase, Point, Segment
from ltf.model.decoder import Decoder, DecoderOutput
from ltf.model.moe import MoE, local_exchange
from ltf.model.router import Routing


class Observer(Protocol):
    """Sees tensors while the pass runs; it must neither change them nor wait for the device."""

    def see(self, point: Point, tensors: Sequence[Tensor]) -> None:
        """Of the backward phase and of buckets, from a thread or stream of the backward pass."""
        ...


Tamper: TypeAlias = Callable[[Point, Tensor], Tensor]
"""For drills: what goes on in place of a tensor; the very same object where nothing is to change."""


class Segments:
    """Hooks on the parts of a model that this rank holds; quiet until `begin`.

    A recomputation in the backward pass is not a second pass: what it computes is seen only in its effect on
    gradients. A compiled layer is seen at its borders, since hooks inside would break its graph.
    """

    def __init__(self, parts: Sequence[nn.Module], tamper: Tamper | None = None) -> None:
        self.active = False
        self.everything = False
        self.observers: tuple[Observer, ...] = ()
        self.tamper = tamper
        for part in parts:
            if not isinstance(part, Decoder):
                raise TypeError(f"a guard watches parts of a Decoder, found {type(part).__name__}")
        self._parts = [_Part(part, self) for part in parts if isinstance(part, Decoder)]

    def begin(self, observers: Sequence[Observer], *, everything: bool = False) -> None:
        """A step's passes come next; micro-batches count from 0.

        `everything`: also where the looks before and after it are enough to tell which rank made a value.
        """
        self.active = True
        self.everything = everything
        self.observers = tuple(observers)
        for part in self._parts:
            part.micro_batch = -1

    def end(self) -> None:
        self.active = False
        self.observers = ()


class _Look:
    """One segment of one layer: shows what it puts out, and the gradient of that when it comes.

    `spared`: the phases in which only those look who look at everything.
    """

    def __init__(self, part: _Part, layer: int, segment: Segment, spared: Collection[Phase] = ()) -> None:
        self._part = part
        self._segments = part.segments
        self._layer = layer
        self._segment = segment
        self._spared = spared
        self._has_gradient = segment not in (Segment.ROUTER, Segment.HEAD)
        # Made once: they come by again in every step.
        self._points: list[tuple[Point, Callable[[Tensor], Tensor | None]]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor to go on with; the very same object where nothing changed it."""
        segments, number = self._segments, self._part.micro_batch
        while number >= len(self._points):
            self._points.append(self._make(len(self._points)))
        point, gradient = self._points[number]
        if segments.tamper is not None:
            changed = segments.tamper(point, tensor)
            if changed is not tensor:
                tensor = _replace(tensor, changed)
        if recomputing():
            return tensor
        if segments.everything or Phase.FORWARD not in self._spared:
            for observer in segments.observers:
                observer.see(point, (tensor,))
        wanted = segments.tamper is not None or segments.everything or Phase.BACKWARD not in self._spared
        if wanted and self._has_gradient and tensor.requires_grad:
            watch: Callable[..., Any] = tensor.register_hook
            watch(gradient)
        return tensor

    def _make(self, number: int) -> tuple[Point, Callable[[Tensor], Tensor | None]]:
        point = Point(Phase.BACKWARD, number, self._layer, self._segment)
        return Point(Phase.FORWARD, number, self._layer, self._segment), partial(self._gradient, point)

    def _gradient(self, point: Point, gradient: Tensor) -> Tensor | None:
        segments = self._segments
        changed = gradient if segments.tamper is None else segments.tamper(point, gradient)
        if segments.everything or Phase.BACKWARD not in self._spared:
            for observer in segments.observers:
                observer.see(point, (changed,))
        return None if changed is gradient else changed


class _Part:
    """The hooks of one part, and which micro-batch is in its forward pass."""

    def __init__(self, part: Decoder, segments: Segments) -> None:
        self.micro_batch = -1
        self.segments = segments
        self._received = _Look(self, min(part.stage.layers, default=0), Segment.RECEIVED)
        part.register_forward_pre_hook(self._enter)
        if part.embed is not None:
            self._output(part.embed, -1, Segment.EMBED)
        for name, wrapped in part.layers.items():
            layer, compiled = int(name), getattr(wrapped, "_compiled_call_impl", None)
            if compiled is not None:
                # Only what calls the compiled function is outside of its graph.
                wrapped._compiled_call_impl = self._border(compiled, layer)
            elif _compiled_inside(wrapped):
                self._output(wrapped, layer, Segment.BLOCK)
            else:
                self._inside(wrapped, layer)
        if part.stage.head:
            self._output(part, part.args.layers, Segment.HEAD)

    def _inside(self, block: nn.Module, layer: int) -> None:
        self._output(block.get_submodule("attention"), layer, Segment.ATTENTION)
        ffn = block.get_submodule("ffn")
        if isinstance(ffn, MoE):
            # Nothing comes from another rank: their output and the layer's gradient say what there is to say.
            here = ffn.exchange is local_exchange
            self._output(ffn.router, layer, Segment.ROUTER)
            ffn.experts.register_forward_pre_hook(self._experts_in(layer, tuple(Phase) if here else ()))
            self._output(ffn.experts, layer, Segment.EXPERTS, (Phase.BACKWARD,) if here else ())
        self._output(ffn, layer, Segment.FFN)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.segments.active or recomputing():
            return None
        self.micro_batch += 1
        assert isinstance(module, Decoder)
        if module.embed is not None or not args:
            return None
        return self._received(args[0]), *args[1:]

    def _experts_in(self, layer: int, spared: Collection[Phase]) -> Callable[..., tuple[Any, ...] | None]:
        look = _Look(self, layer, Segment.EXPERTS_IN, spared)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.segments.active or not args:
                return None
            return look(args[0]), *args[1:]

        return hook

    def _output(
        self, module: nn.Module, layer: int, segment: Segment, spared: Collection[Phase] = ()
    ) -> None:
        look, segments = _Look(self, layer, segment, spared), self.segments

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return _shown(look, out) if segments.active else None

        module.register_forward_hook(hook)

    def _border(self, compiled: Callable[..., Any], layer: int) -> Callable[..., Any]:
        look = _Look(self, layer, Segment.BLOCK)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = compiled(*args, **kwargs)
            shown = _shown(look, out) if self.segments.active else None
            return out if shown is None else shown

        return call


def _shown(look: _Look, out: Any) -> Any:
    """None where the output stays the same object."""
    first = out if isinstance(out, Tensor) else _tensor_of(out)
    shown = look(first)
    if shown is first:
        return None
    return shown if isinstance(out, Tensor) else _with_tensor(out, shown)


def _compiled_inside(module: nn.Module) -> bool:
    """Whether the module's forward function, or what it hands to recomputation, is a compiled one."""
    forward = module.forward
    inner = forward.args if isinstance(forward, partial) else ()
    return any(hasattr(function, "_torchdynamo_orig_callable") for function in (forward, *inner))


def recomputing() -> bool:
    """Whether a backward pass is running on this thread, so that a forward pass is its recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _tensor_of(out: Any) -> Tensor:
    """The tensor that stands for a segment's output of several."""
    if isinstance(out, Routing):
        return out.weights
    if isinstance(out, DecoderOutput):
        return out.out
    tensor: Tensor = out[0]
    return tensor


def _with_tensor(out: Any, tensor: Tensor) -> Any:
    if isinstance(out, Routing):
        return out._replace(weights=tensor)
    if isinstance(out, DecoderOutput):
        return out._replace(out=tensor)
    return tensor, *out[1:]


def _replace(tensor: Tensor, changed: Tensor) -> Tensor:
    replaced: Tensor = _Replaced.apply(tensor, changed.detach())  # type: ignore[no-untyped-call]
    return replaced


class _Replaced(torch.autograd.Function):
    """Other values, the same graph: what a fault in a kernel's output does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, changed: Tensor) -> Tensor:
        return changed.view_as(changed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
