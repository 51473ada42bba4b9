"""Rotary position embedding (arXiv 2104.09864), the halves of a head turned against each other."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape (batch, 1, sequence, head_dim) for positions (batch, sequence).

    Nothing is kept between calls, so a model made on the meta device has no table to rebuild. Angles are
    computed in at least fp32: bf16 cannot tell neighbouring positions apart beyond 256.
    """
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.int64).to(precise) / head_dim
    angle = positions.to(precise)[:, None, :, None] * theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x (batch, heads, sequence, head_dim) turned by its position's angles."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Positions that begin again at 0 where the id changes along (batch, sequence)."""
    place = torch.arange(document_ids.shape[-1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=-1).values
