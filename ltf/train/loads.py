"""Tokens that each expert got in the batch before: what the batch balance loss and the biases go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ltf.model.aux_loss import update_biases
from ltf.model.decoder import Decoder


class Loads:
    """Assignments by layer over the whole batch.

    `group`: the ranks that read other samples and hold the same layers.
    """

    def __init__(
        self, parts: Sequence[Decoder], device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        self._parts = parts
        self._group = group
        self._held = {
            layer: torch.ones(router.weight.shape[0], dtype=torch.int64, device=device)
            for part in parts
            for layer, router in part.routers().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: by name in the whole model, changed in place alone."""
        return {f"loads.{layer}": held for layer, held in self._held.items()}

    def before(self) -> Mapping[int, Tensor]:
        """By layer; even before the first step of a run."""
        return self._held

    def summed(self, counts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """One rank's counts of a step -> all ranks'. A collective of the group."""
        if not self._held:
            return {}
        stacked = torch.stack([counts[layer] for layer in self._held])
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(stacked, group=self._group)
        return dict(zip(self._held, stacked.unbind(), strict=True))

    @torch.no_grad()
    def take(self, counts: Mapping[int, Tensor]) -> None:
        """Remember a batch's loads and move the routers' biases by them, where they have any."""
        for layer, loads in counts.items():
            self._held[layer].copy_(loads)
        for part in self._parts:
            routers = {i: r for i, r in part.routers().items() if r.expert_bias is not None}
            if routers and part.args.moe is not None:
                update_biases(routers, counts, part.args.moe.bias_update_rate)


def fullest(counts: Mapping[int, Tensor]) -> float | None:
    """Tokens of the fullest expert relative to the mean, of the worst layer; None without experts."""
    if not counts:
        return None
    # Moved first: not every device has fp64.
    stacked = torch.stack(list(counts.values())).cpu().double()
    return float((stacked.amax(1) / stacked.mean(1)).max())
