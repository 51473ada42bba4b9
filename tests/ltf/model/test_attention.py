from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ltf.model.args import ModelArgs
from ltf.model.attention import Attention, document_mask
from ltf.model.rope import positions_in_documents, rope_table, rotate
from tests.ltf.model.shapes import DENSE, MOE, decoder, tokens


def turned(vector: list[float], position: int, theta: float) -> list[float]:
    """Rotary embedding of one head by complex multiplication, number by number."""
    half = len(vector) // 2
    pairs = [complex(vector[i], vector[i + half]) for i in range(half)]
    spun = [pair * cmath.exp(1j * position * theta ** (-i / half)) for i, pair in enumerate(pairs)]
    return [z.real for z in spun] + [z.imag for z in spun]


def plain_attention(module: Attention, args: ModelArgs, x: Tensor) -> Tensor:
    """One query at a time, softmax written out."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        heads: dict[str, list[list[Tensor]]] = {}
        for name, count in (("q", args.heads), ("k", args.kv_heads), ("v", args.kv_heads)):
            rows = x[b] @ getattr(module, name).weight.T
            heads[name] = [list(row.view(count, args.head_dim)) for row in rows]
        for t in range(x.shape[1]):
            for name in ("q", "k"):
                norm = getattr(module, f"{name}_norm")
                vectors = heads[name][t]
                if norm is not None:
                    vectors = [v / (v.square().mean() + args.norm_eps).sqrt() * norm.weight for v in vectors]
                turns = [turned(v.tolist(), t, args.rope_theta) for v in vectors]
                heads[name][t] = list(torch.tensor(turns, dtype=x.dtype))
        for t in range(x.shape[1]):
            mixed = []
            for h in range(args.heads):
                kv = h // (args.heads // args.kv_heads)
                scores = torch.stack([heads["q"][t][h] @ heads["k"][s][kv] for s in range(t + 1)])
                weights = (scores / math.sqrt(args.head_dim)).exp()
                weights = weights / weights.sum()
                mixed.append(sum(w * heads["v"][s][kv] for s, w in enumerate(weights)))
            out[b, t] = module.o.weight @ torch.cat(mixed)
    return out


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_what_its_definition_says(kv_heads: int, qk_norm: bool) -> None:
    args = replace(DENSE, kv_heads=kv_heads, qk_norm=qk_norm)
    module = next(decoder(args, dtype=torch.float64).blocks())[1].attention
    for name in ("q_norm", "k_norm") if qk_norm else ():
        torch.nn.init.normal_(getattr(module, name).weight, generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 7, args.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rope = rope_table(torch.arange(7).unsqueeze(0), args.head_dim, args.rope_theta, x.dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            module(x, rope, None), plain_attention(module, args, x), rtol=1e-9, atol=1e-9
        )


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def product(at_q: int, at_k: int) -> Tensor:
        tables = [rope_table(torch.tensor([[p]]), 16, 1e4, torch.float64) for p in (at_q, at_k)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(product(5, 3), product(105, 103))
    assert not torch.isclose(product(5, 3), product(6, 3))
    torch.testing.assert_close(
        rotate(q, rope_table(torch.tensor([[9]]), 16, 1e4, torch.float64)).norm(), q.norm()
    )


def test_positions_far_apart_differ_in_bf16_too() -> None:
    cos, _ = rope_table(torch.tensor([[1000, 1001]]), 16, 1e4, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0, 0] != cos[0, 0, 1, 0]


def test_a_token_sees_nothing_after_it() -> None:
    model, x = decoder(MOE, dtype=torch.float64), tokens(MOE)
    changed = x.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % MOE.vocab_size
    with torch.no_grad():
        one, other = model(x).out, model(changed).out
    torch.testing.assert_close(one[:, :8], other[:, :8], rtol=1e-12, atol=1e-12)
    assert (one[:, 8:] - other[:, 8:]).abs().max() > 1e-3


def test_positions_begin_again_where_the_document_changes() -> None:
    ids = torch.tensor([[4, 4, 4, 7, 7, 4], [1, 2, 2, 2, 2, 2]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_the_document_mask_is_causal_inside_each_document() -> None:
    mask = document_mask(torch.tensor([[5, 5, 6]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("args", [DENSE, MOE], ids=["dense", "experts"])
def test_packed_documents_give_the_logits_of_separate_ones(args: ModelArgs) -> None:
    model = decoder(args, dtype=torch.float64)
    documents = [tokens(args, 1, length, seed=length) for length in (5, 1, 9)]
    ids = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)], dim=1)
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), document_ids=ids).out
        separate = torch.cat([model(d).out for d in documents], dim=1)
        unmasked = model(torch.cat(documents, dim=1)).out
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)
    assert (unmasked - separate).abs().max() > 1e-3
