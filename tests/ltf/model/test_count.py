from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.count import count_parameters, token_flops
from ltf.model.decoder import Decoder
from ltf.model.moe import MoE
from tests.ltf.model.shapes import COUNTED, DENSE, MOE, decoder, tokens

LARGE = ModelArgs(
    vocab_size=151_936,
    layers=64,
    width=4096,
    heads=64,
    kv_heads=8,
    head_dim=128,
    moe=MoEArgs(experts=160, top_k=10, expert_width=1536, shared_experts=1),
)
"""About 200B parameters, 20B of them active."""
QWEN3_30B_A3B = ModelArgs(
    vocab_size=151_936,
    layers=48,
    width=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    moe=MoEArgs(experts=128, top_k=8, expert_width=768),
)


@pytest.mark.parametrize("name", COUNTED)
def test_the_count_is_the_models_own(name: str) -> None:
    args = COUNTED[name]
    assert count_parameters(args).total == sum(p.numel() for p in Decoder(args).parameters())


@pytest.mark.parametrize("name", COUNTED)
def test_active_parameters_are_those_left_without_the_experts_not_chosen(name: str) -> None:
    args = COUNTED[name]
    model = Decoder(args)
    active = sum(p.numel() for p in model.parameters())
    for index, block in model.blocks():
        if isinstance(block.ffn, MoE):
            active -= sum(p[args.top_k(index) :].numel() for p in block.ffn.experts.parameters())
    assert count_parameters(args).active == active


def test_a_model_of_200b_is_made_on_meta_and_counted_in_seconds() -> None:
    start = time.process_time()
    with torch.device("meta"):
        model = Decoder(LARGE)
    total = sum(p.numel() for p in model.parameters())
    count = count_parameters(LARGE)
    assert count.total == total
    assert 190e9 < count.total < 210e9
    assert 19e9 < count.active < 21e9
    assert time.process_time() - start < 10


def test_the_published_sizes_of_qwen3_30b_a3b_come_out() -> None:
    """30.5B, 29.9B without the embeddings, 3.3B activated: https://huggingface.co/Qwen/Qwen3-30B-A3B."""
    count = count_parameters(QWEN3_30B_A3B)
    assert round(count.total / 1e9, 1) == 30.5
    assert round((count.total - count.embedding - count.head) / 1e9, 1) == 29.9
    assert 3.3e9 < count.active < 3.4e9


@pytest.mark.parametrize(
    "name", [n for n, a in COUNTED.items() if a.moe is None or isinstance(a.moe.top_k, int)]
)
def test_the_flops_are_those_that_torch_counts_in_the_matrices(name: str) -> None:
    args, length = COUNTED[name], 24
    model = decoder(args, dtype=torch.float64)  # fp64 takes the loop, whose products torch can count
    x = tokens(args, batch=3, length=length)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    expected = token_flops(args, length, causal=False).forward * x.numel()
    combine = sum(2 * args.top_k(layer) * args.width for layer in args.moe_layers) * x.numel()
    assert counter.get_total_flops() - combine == expected


def test_causal_attention_costs_half_and_training_three_times_the_forward() -> None:
    whole, causal = (token_flops(DENSE, 1000, causal=c) for c in (False, True))
    assert causal.attention == pytest.approx(whole.attention * 1001 / 2000)
    assert causal.matmul == whole.matmul
    assert causal.training == 3 * (causal.matmul + causal.attention)


def test_tying_the_head_saves_parameters_and_no_work() -> None:
    tied = replace(DENSE, tied_embeddings=True)
    saved = count_parameters(DENSE).total - count_parameters(tied).total
    assert saved == DENSE.vocab_size * DENSE.width
    assert token_flops(tied, 10) == token_flops(DENSE, 10)


def test_more_experts_make_a_model_larger_and_a_token_no_dearer() -> None:
    assert MOE.moe is not None
    more = replace(MOE, moe=replace(MOE.moe, experts=16))
    assert count_parameters(more).experts == 2 * count_parameters(MOE).experts
    router = 2.0 * MOE.layers * MOE.width * 8
    assert token_flops(more, 10).forward == token_flops(MOE, 10).forward + router
