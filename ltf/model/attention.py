"""Causal grouped-query attention with optional normalisation of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltf.model.args import ModelArgs
from ltf.model.norm import RMSNorm
from ltf.model.rope import rotate


class Attention(nn.Module):
    """Heads of queries share `heads / kv_heads` to one head of keys and values (arXiv 2305.13245)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.q = nn.Linear(args.width, args.heads * args.head_dim, bias=False)
        self.k = nn.Linear(args.width, args.kv_heads * args.head_dim, bias=False)
        self.v = nn.Linear(args.width, args.kv_heads * args.head_dim, bias=False)
        self.o = nn.Linear(args.heads * args.head_dim, args.width, bias=False)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x (batch, sequence, width); mask from `document_mask`; None: causal over the whole sequence."""
        batch, length, _ = x.shape
        q, k, v = (proj(x).view(batch, length, -1, self.head_dim) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope), v.transpose(1, 2)
        out = attend(q, k, v, mask)
        projected: Tensor = self.o(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (batch, heads, sequence, head_dim), k and v with as many heads or fewer; no mask: causal."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:
        # On accelerators the fused kernels that take a mask want equal heads. What is left otherwise keeps
        # every score for the backward pass.
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
    )


def document_mask(document_ids: Tensor) -> Tensor:
    """(batch, 1, sequence, sequence): true where a token may look, itself and its document before it.

    document_ids (batch, sequence): tokens of one document have one id and stand together. Memory grows with
    the square of the sequence, one byte an entry, and is held once for all layers.
    """
    length = document_ids.shape[-1]
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return same & causal
