"""L2 norms of gradients and parameters, of all and of each layer, the same on all ranks of any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltf.parallel.shard import local
from ltf.parallel.world import PeersGone, World


@dataclass(frozen=True)
class Norms:
    """`layers` by index, all ranks' parts together; `total` also counts the embedding, last norm and head."""

    total: float
    layers: Mapping[int, float]


def gradient_norms(parameters: Iterable[tuple[str, Tensor]], world: World, layers: int) -> Norms:
    """Of the reduced gradients, by parameter name; `layers`: of the whole model. All ranks call it together.

    A parameter without a gradient counts as zero. One small collective; PeersGone if it fails. Sums are taken
    in fp64 on the CPU; a device's own and its collective are in fp32.
    """
    found = [(name, p, p.grad) for name, p in parameters if p.grad is not None]
    return _norms([(name, p, local(gradient)) for name, p, gradient in found], world, layers)


def parameter_norms(parameters: Iterable[tuple[str, Tensor]], world: World, layers: int) -> Norms:
    """Of the parameters themselves; else as `gradient_norms`."""
    return _norms([(name, p, local(p.detach())) for name, p in parameters], world, layers)


@torch.no_grad()
def clip_(parameters: Iterable[tuple[str, Tensor]], norm: float, limit: float) -> float:
    """Scale gradients, in place, so that their global norm, `norm` now, is at most `limit`; the factor, <= 1.

    A norm that is not finite makes gradients NaN, as it must if nobody skips such a step.
    """
    factor = min(1.0, limit / (norm + 1e-6)) if math.isfinite(norm) else math.nan
    gradients = [local(p.grad) for _, p in parameters if p.grad is not None]
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
    return factor


@torch.no_grad()
def _norms(values: Sequence[tuple[str, Tensor, Tensor]], world: World, layers: int) -> Norms:
    """values: name, parameter (for its placement) and the local tensor to measure."""
    counted = [
        (name, tensor) for name, parameter, tensor in values if _is_counted(parameter) and tensor.numel()
    ]
    # Rows of the sum: each layer, and last all that is in none.
    squares = torch.zeros(layers + 1, dtype=torch.float64)
    dtype = torch.float64 if world.device.type == "cpu" else torch.float32
    if counted:
        each = torch._foreach_norm([tensor for _, tensor in counted], 2, dtype)
        rows = torch.tensor([_row(name, layers) for name, _ in counted])
        squares.index_add_(0, rows, torch.stack(list(each)).to("cpu", torch.float64).square())
    if world.size > 1:
        try:
            # Over the devices' network: a ring of hosts would take long for thousands of ranks.
            shared = squares.to(world.device, dtype)
            dist.all_reduce(shared)
            squares = shared.to("cpu", torch.float64)
        except RuntimeError as error:
            raise PeersGone(world.alone(error)) from error
    by_row: list[float] = squares.sqrt().tolist()
    return Norms(math.sqrt(float(squares.sum())), dict(enumerate(by_row[:layers])))


def _is_counted(parameter: Tensor) -> bool:
    """Of a parameter's equal copies, the one on the first of the ranks that hold it."""
    if not isinstance(parameter, DTensor):
        return True
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None  # a parameter lives where its rank is in the mesh
    placed = zip(parameter.placements, coordinate, strict=True)
    return all(index == 0 for placement, index in placed if placement.is_replicate())


def _row(name: str, layers: int) -> int:
    """`layers.3.ffn.down.weight` -> 3; the row after the last layer for what is in no layer."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else layers
