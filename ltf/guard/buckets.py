"""Shows the gradients of a rank's parameters before they are added to the other ranks'.

Megatron-LM looks at the same place (its gradient buckets, before the data-parallel reduction): afterwards all
ranks hold the same sum, and nobody can say who spoiled it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from ltf.guard.point import Phase, Point, Segment
from ltf.guard.segments import Observer, Tamper
from ltf.parallel.shard import local

SMALL = 2**16
"""Elements of a gradient up to which it is looked at together with others of its place."""

# Newer versions of torch have another name for it and warn of the old one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Buckets:
    """Of FSDP2 modules the flat input of each reduction, in its reduction dtype; of other parameters `grad`.

    It is looked at on the stream of the reduction, which the step waits for anyway.
    """

    def __init__(self, parts: Sequence[nn.Module], layers: int, tamper: Tamper | None = None) -> None:
        self._active = False
        self._observers: tuple[Observer, ...] = ()
        self._tamper = tamper
        self._seen: dict[tuple[int, Segment], int] = {}
        self._plain: dict[tuple[int, Segment], list[nn.Parameter]] = {}
        for part in parts:
            sharded: set[nn.Parameter] = set()
            for name, module in part.named_modules():
                if isinstance(module, FSDPModule):
                    sharded |= _managed(module)
                    module.set_custom_reduce_scatter(_Watched(self, place_of(name, layers)))
            for name, parameter in part.named_parameters():
                if parameter.requires_grad and parameter not in sharded:
                    self._plain.setdefault(place_of(name, layers), []).append(parameter)

    def begin(self, observers: Sequence[Observer]) -> None:
        self._active = True
        self._observers = tuple(observers)
        self._seen = {}

    def end(self) -> None:
        """After the last backward pass: look at the gradients that no reduction has shown."""
        for place, parameters in self._plain.items():
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            if gradients:
                self.look(place, gradients)
        self._active = False
        self._observers = ()

    @torch.no_grad()
    def look(self, place: tuple[int, Segment], tensors: Sequence[Tensor]) -> None:
        if not self._active:
            return
        layer, segment = place
        point = Point(Phase.BUCKET, self._seen.get(place, 0), layer, segment)
        self._seen[place] = point.micro_batch + 1
        if self._tamper is not None:
            for tensor in tensors:
                changed = self._tamper(point, tensor)
                if changed is not tensor:
                    tensor.copy_(changed)
                    break
        if self._observers:
            together = _together(tensors)
            for observer in self._observers:
                observer.see(point, together)


class _Watched(ReduceScatter):
    """FSDP2's own reduction, with a look at what goes in."""

    def __init__(self, buckets: Buckets, place: tuple[int, Segment]) -> None:
        self._buckets = buckets
        self._place = place
        self._input: Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        # FSDP2 asks for the input, fills it, then asks for the output on the stream of the reduction. A group
        # of one rank has an output as large as the input and no call follows: this is the only place to look.
        filled, self._input = self._input, None
        tensor = torch.empty(*size, dtype=dtype, device=device)
        if filled is None:
            self._input = tensor
        elif filled.numel() == tensor.numel():
            self._buckets.look(self._place, (filled,))
        return tensor

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        self._buckets.look(self._place, (input_tensor,))
        work: dist.Work | None = _reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
        return work


def reduced(
    parameters: Iterable[tuple[str, nn.Parameter]], layers: int
) -> dict[tuple[int, Segment], list[Tensor]]:
    """This rank's shards of the gradients after the reduction, by layer and segment."""
    found: dict[tuple[int, Segment], list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(place_of(name, layers), []).append(local(parameter.grad))
    return found


def place_of(name: str, layers: int) -> tuple[int, Segment]:
    """Layer and segment of a module or parameter by its name in the whole model."""
    if match := re.match(r"layers\.(\d+)\b(.*\.experts\b)?", name):
        return int(match[1]), Segment.EXPERTS if match[2] else Segment.BLOCK
    if name.startswith("embed"):
        return -1, Segment.EMBED
    if name.startswith(("norm", "lm_head")):
        return layers, Segment.HEAD
    return -1, Segment.MODEL


def _together(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The small ones as one: to start a kernel takes longer than to read them."""
    small = [tensor for tensor in tensors if tensor.numel() <= SMALL]
    if len(small) < 2 or len({(tensor.dtype, tensor.device) for tensor in small}) > 1:
        return tensors
    large = [tensor for tensor in tensors if tensor.numel() > SMALL]
    return [torch.cat([tensor.reshape(-1) for tensor in small]), *large]


def _managed(module: FSDPModule) -> set[nn.Parameter]:
    groups = module._get_fsdp_state()._fsdp_param_groups
    return {fsdp_param.sharded_param for group in groups for fsdp_param in group.fsdp_params}
