"""First values of a sharded model: each rank fills its own part with what one rank alone would have there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltf.model.args import ModelArgs
from ltf.model.decoder import Decoder
from ltf.model.hf import Reader
from ltf.model.init import drawn, weight_std


class Values(Protocol):
    """Where values come from: the whole parameter of that name in fp32 on the CPU, or one expert's matrix."""

    def __call__(self, name: str, shape: torch.Size, expert: int | None) -> Tensor:
        """`shape` is that of the result; `expert` its index in the whole model, None for other parameters."""
        ...


@torch.no_grad()
def fill(part: Decoder, values: Values) -> None:
    """Fill every parameter, sharded or not, and every buffer of a model that is not on the meta device.

    One parameter, or one expert's matrix, is whole in the host's memory at a time.
    """
    for name, parameter in part.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        where = window(parameter)
        if local.numel() == 0:
            continue
        if parameter.ndim == 3:
            for matrix, expert in zip(local, range(where[0].start, where[0].stop), strict=True):
                matrix.copy_(values(name, parameter.shape[1:], expert)[where[1:]])
        else:
            local.copy_(values(name, parameter.shape, None)[where])
    for router in part.routers().values():
        if router.expert_bias is not None:
            router.expert_bias.zero_()


def random_values(args: ModelArgs, seed: int) -> Values:
    """Those of `ltf.model.init.init_weights`, bit for bit."""

    def values(name: str, shape: torch.Size, expert: int | None) -> Tensor:
        std = weight_std(name, args)
        if std is None:
            return torch.ones(shape)
        return drawn(shape, std, seed, name if expert is None else f"{name}.{expert}")

    return values


@contextmanager
def saved_values(path: Path, args: ModelArgs) -> Iterator[Values]:
    """Those of a folder of Hugging Face safetensors; HfError if they are not this model's."""
    with Reader.open(path) as reader:
        reader.refuse_strangers(args)

        def values(name: str, shape: torch.Size, expert: int | None) -> Tensor:
            if expert is None:
                whole = torch.empty(shape)
                reader.fill(whole, name)
                return whole
            one = torch.empty(1, *shape)
            reader.fill(one, name, first_expert=expert)
            return one[0]

        yield values


def window(parameter: Tensor) -> tuple[slice, ...]:
    """The part of the whole tensor that this rank holds; all of it for a plain tensor.

    Experts are first divided among the ranks of an expert group, then among those that shard the same
    experts; mesh dimensions thus cut from the last to the first, as `fully_shard` and DTensor agree.
    """
    held = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # a parameter lives where its rank is in the mesh
        placed = list(enumerate(parameter.placements))
        for axis, placement in reversed(placed):
            if not placement.is_replicate():
                dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard, strided or not
                held[dim] = _chunk(*held[dim], mesh.size(axis), coordinate[axis])
    return tuple(slice(start, stop) for start, stop in held)


def _chunk(start: int, stop: int, count: int, index: int) -> tuple[int, int]:
    """As torch.chunk cuts: all pieces as long as the first, until nothing is left."""
    length = -(-(stop - start) // count)
    return min(start + index * length, stop), min(start + (index + 1) * length, stop)
