"""A tiny trainer for these tests: a real decoder, AdamW, random batches; any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ltf.checkpoint.saver import Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Checkpoint
from ltf.model.args import ModelArgs, MoEArgs, Stage
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights

ARGS = ModelArgs(
    vocab_size=40,
    layers=2,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    moe=MoEArgs(experts=4, top_k=2, expert_width=8, bias_update_rate=0.01),
)
CONFIG = {
    "model": {
        "vocab_size": 40,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "moe": {"experts": 4, "top_k": 2, "expert_width": 8, "bias_update_rate": 0.01},
    }
}


class Toy:
    """The model on this rank, sharded if there are several, and its optimizer."""

    def __init__(self, *, seed: int = 1, stage: Stage | None = None, shard: bool = True) -> None:
        self.model = Decoder(ARGS, stage)
        init_weights(self.model, seed)
        if shard and dist.is_initialized() and dist.get_world_size() > 1:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
            for layer in self.model.layers.values():
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = State([self.model], [self.optimizer])

    def work(self) -> torch.Tensor:
        """Forward and backward on a batch from this rank's generator."""
        tokens = torch.randint(0, ARGS.vocab_size, (2, 8))
        out = self.model(tokens).out
        loss = nn.functional.cross_entropy(out.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        for router in self.model.routers().values():
            assert router.expert_bias is not None
            router.expert_bias.add_(0.125)


def settings(**changes: Any) -> Checkpoint:
    return Checkpoint(**changes)


def saver(folder: Path, toy: Toy, **options: Any) -> Saver:
    """`options` of Checkpoint and of Saver alike."""
    own = {key: options.pop(key) for key in list(options) if key in Checkpoint.model_fields}
    options.setdefault("signals", False)
    return Saver(Store(folder), toy.state, settings(**own), config=CONFIG, **options)


def train(toy: Toy, saver: Saver, first: int, last: int, *, save_at: tuple[int, ...] = ()) -> list[float]:
    """Losses of the steps `first` + 1 to `last`."""
    saver.finished_update(first, {"step": first})
    losses = []
    for step in range(first + 1, last + 1):
        losses.append(float(toy.work()))
        saver.before_update()
        toy.update()
        saver.finished_update(step, {"step": step})
        if step in save_at:
            saver.request()
    return losses


def join() -> None:
    """torch.distributed as the launcher's environment says."""
    dist.init_process_group("gloo")


def whole(toy: Toy) -> dict[str, torch.Tensor]:
    """Every tensor of the state, gathered and copied."""
    found = {}
    tensors = dict(toy.model.named_parameters()) | dict(toy.model.named_buffers())
    names = {id(p): n for n, p in toy.model.named_parameters()}
    for parameter, values in toy.optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}/{key}": value for key, value in values.items()}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = full.detach().clone()
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def flip_bit(path: Path, where: float = 0.5) -> None:
    """One bit, at that fraction of the file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x10
    path.write_bytes(bytes(data))
