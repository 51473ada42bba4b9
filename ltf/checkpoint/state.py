"""The tensors of training by fully qualified name, as each rank holds them, and their copies.

References are taken once, when modules are sharded and nothing is gathered: between a forward and a backward
pass FSDP puts gathered parameters in a module's place, and what a module's own `state_dict` gives then is not
what the optimizer changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ltf.checkpoint.pieces import Piece

_V = TypeVar("_V")

MODEL = "model."
OPTIMIZER = "optimizer."
RUN = "run."
# What torch's wrappers add to the names of the modules inside them.
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


class State:
    """Parameters, persistent buffers and optimizer state of the module (or pipeline stages) of one rank.

    Made after sharding; optimizers hold these parameters. Tensors must be changed in place from then on.
    `beside`: what else of a run is tensors, by name, equal on all ranks that have that name.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] = (),
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._beside = dict(beside or {})
        self.optimizers = tuple(optimizers)
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for part in parts:
            for name, parameter in part.named_parameters():
                self._add(self._parameters, _plain(name), parameter)
            for path, module in part.named_modules():
                for key in module._buffers.keys() - module._non_persistent_buffers_set:
                    self._add(self._buffers, _plain(f"{path}.{key}" if path else key), (module, key))
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        unknown = [
            p
            for o in self.optimizers
            for g in o.param_groups
            for p in g["params"]
            if id(p) not in self._names
        ]
        if unknown:
            raise ValueError(f"an optimizer holds {len(unknown)} parameters that are in no module given")

    @staticmethod
    def _add(names: dict[str, _V], name: str, value: _V) -> None:
        if name in names:
            raise ValueError(f"two parts of the model hold {name}")
        names[name] = value

    @torch.no_grad()
    def pieces(self) -> list[Piece]:
        """What there is now. Uses no collective; the locals are the live tensors."""
        found = [_piece(f"{MODEL}{name}", parameter) for name, parameter in self._parameters.items()]
        for name, (module, key) in self._buffers.items():
            if (buffer := module._buffers[key]) is not None:
                found.append(_piece(f"{MODEL}{name}", buffer))
        found += [_piece(f"{RUN}{name}", tensor) for name, tensor in self._beside.items()]
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                found += self._optimizer_pieces(parameter, values)
        return found

    def _optimizer_pieces(self, parameter: Tensor, values: Mapping[str, object]) -> Iterator[Piece]:
        name = self._names[id(parameter)]
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer state {key!r} of {name} is {type(value).__name__}, only tensors are saved"
                )
            yield _piece(f"{OPTIMIZER}{name}.{key}", value)

    @torch.no_grad()
    def make_optimizer_state(self, wanted: bool) -> None:
        """Have, or have not, the tensors that an optimizer makes at its first step, whatever their values.

        Parameters keep their values, gradients are lost.
        """
        for optimizer in self.optimizers:
            if not wanted:
                optimizer.state.clear()
            elif not optimizer.state:
                _first_step(optimizer)


class Buffers:
    """CPU memory for copies of pieces, taken once and used again; pinned where an accelerator copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[str, Tensor] = {}
        self._stream = _side_stream(device)

    @torch.no_grad()
    def copy(self, pieces: Iterable[Piece], after: torch.Event | None) -> list[Piece]:
        """Pieces with locals on the CPU, complete on return. `after`: recorded behind the last change.

        The copies run on a stream of their own: work queued on the training's, which may be waiting for other
        ranks, does not hold them up.
        """
        found = list(pieces)
        if self._stream is None:
            return [self._into(piece, non_blocking=False) for piece in found]
        with self._stream:
            if after is not None:
                self._stream.wait_event(after)
            copies = [self._into(piece, non_blocking=True) for piece in found]
        self._stream.synchronize()
        return copies

    def _into(self, piece: Piece, *, non_blocking: bool) -> Piece:
        source = piece.local
        memory = self._memory.get(piece.name)
        if memory is None or memory.shape != source.shape or memory.dtype != source.dtype:
            memory = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._stream is not None)
            self._memory[piece.name] = memory
        memory.copy_(source, non_blocking=non_blocking)
        return Piece(piece.name, piece.shape, piece.offset, memory)


def changed(device: torch.device) -> torch.Event | None:
    """A mark behind all work queued so far on the calling thread's stream.

    None where nothing is left to wait for: on the CPU, and on a device without such marks.
    """
    if device.type == "cpu":
        return None
    try:
        event = torch.Event(device)
        event.record(torch.accelerator.current_stream(device))
    except (RuntimeError, NotImplementedError):
        # Without a mark, what is queued must be done before anyone may copy: a copy of half an update would
        # have right digests.
        torch.accelerator.synchronize(device)
        return None
    return event


def generators(rank: int, device: torch.device) -> list[Piece]:
    """The states of the rank's random number generators, as copies."""
    found = [Piece.whole(_generator(rank, "cpu"), torch.get_rng_state())]
    if device.type != "cpu":
        state = torch.get_device_module(device).get_rng_state(device)
        found.append(Piece.whole(_generator(rank, device.type), state))
    return found


def restore_generators(pieces: Iterable[Piece], device: torch.device) -> None:
    """`pieces`: what `generators` gave."""
    for piece in pieces:
        if piece.name.endswith(".cpu"):
            torch.set_rng_state(piece.local)
        else:
            torch.get_device_module(device).set_rng_state(piece.local, device)


def _side_stream(device: torch.device) -> torch.Stream | None:
    if device.type == "cpu":
        return None
    try:
        return torch.Stream(device)
    except (RuntimeError, NotImplementedError):
        return None


def _generator(rank: int, kind: str) -> str:
    return f"rng.{rank}.{kind}"


def _piece(name: str, tensor: Tensor) -> Piece:
    if not isinstance(tensor, DTensor):
        return Piece.whole(name, tensor.detach())
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if len(chunks) != 1:
        raise ValueError(f"{name} lies in {len(chunks)} parts on one rank, expected 1")
    return Piece(name, tensor.shape, chunks[0].offsets, tensor.to_local().detach())


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _first_step(optimizer: Optimizer) -> None:
    """A step of nothing: no gradient, no learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
