"""Tokens that each expert got in the batch before: what the batch balance loss and the biases go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltf.model.aux_loss import update_biases
from ltf.model.decoder import Decoder


class Loads(nn.Module):
    """Assignments by layer over the whole batch; buffers, so that checkpoints keep them by name.

    `group`: the ranks that read other samples and hold the same layers.
    """

    def __init__(
        self, parts: Sequence[Decoder], device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.parts = parts
        self._group = group
        routers = {layer: router for part in parts for layer, router in part.routers().items()}
        self.layers = sorted(routers)
        for layer in self.layers:
            experts = routers[layer].weight.shape[0]
            empty = torch.zeros(experts, dtype=torch.int64, device=device)
            self.register_buffer(f"loads_{layer}", empty)

    def before(self) -> dict[int, Tensor]:
        """By layer; empty before the first step of a run."""
        held = {layer: self._of(layer) for layer in self.layers}
        return held if self._known(held) else {}

    def summed(self, counts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """One rank's counts of a step -> all ranks'. A collective of the group."""
        if not self.layers:
            return {}
        stacked = torch.stack([counts[layer] for layer in self.layers])
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(stacked, group=self._group)
        return dict(zip(self.layers, stacked.unbind(), strict=True))

    @torch.no_grad()
    def take(self, counts: Mapping[int, Tensor]) -> None:
        """Remember a batch's loads and move the routers' biases by them, where they have any."""
        for layer, loads in counts.items():
            self._of(layer).copy_(loads)
        for part in self.parts:
            routers = {i: r for i, r in part.routers().items() if r.expert_bias is not None}
            if routers and part.args.moe is not None:
                update_biases(routers, counts, part.args.moe.bias_update_rate)

    def _of(self, layer: int) -> Tensor:
        buffer: Tensor = getattr(self, f"loads_{layer}")
        return buffer

    def _known(self, held: Mapping[int, Tensor]) -> bool:
        # Every token has an expert in every layer, so one layer tells for all.
        return bool(held) and bool(next(iter(held.values())).any())


def fullest(counts: Mapping[int, Tensor]) -> float | None:
    """Tokens of the fullest expert relative to the mean, of the worst layer; None without experts."""
    if not counts:
        return None
    stacked = torch.stack(list(counts.values())).double()
    return float((stacked.amax(1) / stacked.mean(1)).max())
