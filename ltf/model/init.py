"""First values of the weights: a pure function of the seed and each parameter's name."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ltf.model.args import InitArgs, InitScheme, ModelArgs
from ltf.model.decoder import Decoder

# What writes to the residual stream, and so is scaled down with depth by InitScheme.SCALED_OUTPUT.
OUTPUTS = ("attention.o.weight", "ffn.down.weight", "ffn.experts.down", "ffn.shared.down.weight")


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter and buffer of a model that is not on the meta device.

    A parameter's values depend on the seed and its name in the whole model, an expert's on its index too,
    never on which others the model holds, on its device or on its dtype (they are drawn in fp32 on the CPU).
    Pipeline stages thus hold what the whole model would.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device and holds no values: call to_empty(device=...) first"
            )
        std = weight_std(name, model.args)
        if std is None:
            parameter.fill_(1.0)
        elif parameter.ndim == 3:
            for expert, matrix in enumerate(parameter.unbind()):
                matrix.copy_(drawn(matrix.shape, std, seed, f"{name}.{expert}"))
        else:
            parameter.copy_(drawn(parameter.shape, std, seed, name))
    for router in model.routers().values():
        if router.expert_bias is not None:
            router.expert_bias.zero_()


def weight_std(name: str, args: ModelArgs) -> float | None:
    """Standard deviation for a parameter of that name; None for a norm's weight, which begins at one."""
    init: InitArgs = args.init
    if "norm" in name:
        return None
    if name.endswith("router.weight"):
        return init.std if init.router_std is None else init.router_std
    if init.scheme is InitScheme.SCALED_OUTPUT and name.endswith(OUTPUTS):
        return init.std / math.sqrt(2 * args.layers)
    return init.std


def drawn(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """A Gaussian fp32 tensor on the CPU, its own for each seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return nn.init.normal_(torch.empty(shape), std=std, generator=generator)
