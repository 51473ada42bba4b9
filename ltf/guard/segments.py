"""Looks into a model's passes: shows what every stretch of computation put out, and the gradients of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ltf.guard.point import Phase, Point, Segment
from ltf.model.decoder import Decoder, DecoderOutput
from ltf.model.moe import MoE
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
        self._observers: tuple[Observer, ...] = ()
        self._tamper = tamper
        for part in parts:
            if not isinstance(part, Decoder):
                raise TypeError(f"a guard watches parts of a Decoder, found {type(part).__name__}")
        self._parts = [_Part(part, self) for part in parts if isinstance(part, Decoder)]

    def begin(self, observers: Sequence[Observer]) -> None:
        """A step's passes come next; micro-batches count from 0."""
        self.active = True
        self._observers = tuple(observers)
        for part in self._parts:
            part.micro_batch = -1

    def end(self) -> None:
        self.active = False
        self._observers = ()

    def output(self, point: Point, tensor: Tensor) -> Tensor:
        """Show a forward tensor, and its gradient when that comes; the tensor to go on with."""
        if self._tamper is not None:
            changed = self._tamper(point, tensor)
            if changed is not tensor:
                tensor = _replace(tensor, changed)
        if recomputing():
            return tensor
        for observer in self._observers:
            observer.see(point, (tensor,))
        if tensor.requires_grad and point.segment not in (Segment.ROUTER, Segment.HEAD):
            backward = Point(Phase.BACKWARD, point.micro_batch, point.layer, point.segment)
            watch: Callable[..., Any] = tensor.register_hook
            watch(lambda gradient: self._gradient(backward, gradient))
        return tensor

    def _gradient(self, point: Point, gradient: Tensor) -> Tensor | None:
        changed = gradient if self._tamper is None else self._tamper(point, gradient)
        for observer in self._observers:
            observer.see(point, (changed,))
        return None if changed is gradient else changed


class _Part:
    """The hooks of one part, and which micro-batch is in its forward pass."""

    def __init__(self, part: Decoder, segments: Segments) -> None:
        self.micro_batch = -1
        self.segments = segments
        self.first = min(part.stage.layers, default=0)
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
            self._output(ffn.router, layer, Segment.ROUTER)
            ffn.experts.register_forward_pre_hook(self._experts_in(layer))
            self._output(ffn.experts, layer, Segment.EXPERTS)
        self._output(ffn, layer, Segment.FFN)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.segments.active or recomputing():
            return None
        self.micro_batch += 1
        assert isinstance(module, Decoder)
        if module.embed is not None or not args:
            return None
        return self._show(self.first, Segment.RECEIVED, args[0]), *args[1:]

    def _experts_in(self, layer: int) -> Callable[..., tuple[Any, ...] | None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.segments.active or not args:
                return None
            return self._show(layer, Segment.EXPERTS_IN, args[0]), *args[1:]

        return hook

    def _output(self, module: nn.Module, layer: int, segment: Segment) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return self._shown(layer, segment, out) if self.segments.active else None

        module.register_forward_hook(hook)

    def _border(self, compiled: Callable[..., Any], layer: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = compiled(*args, **kwargs)
            shown = self._shown(layer, Segment.BLOCK, out) if self.segments.active else None
            return out if shown is None else shown

        return call

    def _shown(self, layer: int, segment: Segment, out: Any) -> Any:
        """None where the output stays the same object."""
        first = out if isinstance(out, Tensor) else _tensor_of(out)
        shown = self._show(layer, segment, first)
        if shown is first:
            return None
        return shown if isinstance(out, Tensor) else _with_tensor(out, shown)

    def _show(self, layer: int, segment: Segment, tensor: Tensor) -> Tensor:
        return self.segments.output(Point(Phase.FORWARD, self.micro_batch, layer, segment), tensor)


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
