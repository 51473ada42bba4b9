from __future__ import annotations

import re

import pytest
import torch

from ltf.config.agreement import check_world
from ltf.config.read import presets, read
from ltf.estimate import smallest_world
from ltf.model.count import ParameterCount, count_parameters
from ltf.model.decoder import Decoder


def count(name: str) -> ParameterCount:
    return count_parameters(read(name).model)


@pytest.mark.parametrize("name", presets())
def test_every_preset_reads_and_fits_the_ranks_that_its_degrees_ask_for(name: str) -> None:
    config = read(name)
    assert config.run.name == name
    check_world(config, smallest_world(config))


@pytest.mark.parametrize("name", presets())
def test_the_count_of_every_preset_is_that_of_the_model_itself(name: str) -> None:
    args = read(name).model
    with torch.device("meta"):
        model = Decoder(args)
    assert count_parameters(args).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", presets())
def test_every_preset_says_where_its_numbers_are_from(name: str) -> None:
    head = presets()[name].read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"https://|our own", head, re.IGNORECASE)
    assert name == "tiny" or re.search(r"our assumption", head, re.IGNORECASE)


def test_the_tiny_one_is_a_small_mixture_of_experts_on_bytes() -> None:
    args = read("tiny").model
    assert args.moe is not None
    assert args.vocab_size >= 258
    assert count("tiny").total < 2e6


def test_the_dense_one_has_the_published_size_of_qwen3_1_7b() -> None:
    """1.7B, 1.4B without the embedding: https://huggingface.co/Qwen/Qwen3-1.7B."""
    found = count("dense")
    assert round(found.total / 1e9, 1) == 1.7
    assert round((found.total - found.embedding) / 1e9, 1) == 1.4
    assert found.active == found.total


def test_qwen3_30b_a3b_has_the_published_sizes() -> None:
    """30.5B, 29.9B without the embeddings, 3.3B activated: https://huggingface.co/Qwen/Qwen3-30B-A3B."""
    found = count("qwen3-30b-a3b")
    assert round(found.total / 1e9, 1) == 30.5
    assert round((found.total - found.embedding - found.head) / 1e9, 1) == 29.9
    assert 3.3e9 < found.active < 3.4e9


def test_sigma_moe_tiny_has_the_published_shape_and_sizes() -> None:
    """56 layers, width 1536, 96 experts, one a token; 20B and 0.5B: arXiv 2512.16248."""
    args, found = read("sigma-moe-tiny").model, count("sigma-moe-tiny")
    assert args.moe is not None
    assert (args.layers, args.width, args.moe.experts, args.moe.top_k) == (56, 1536, 96, 1)
    assert round(found.total / 1e9) == 20
    assert round((found.active - found.embedding - found.head) / 1e9, 1) == 0.5


def test_the_large_one_has_200b_parameters_and_20b_active() -> None:
    found = count("sigma-200b-a20b")
    assert found.total == pytest.approx(200e9, rel=0.02)
    assert found.active == pytest.approx(20e9, rel=0.03)


def test_the_large_one_fits_the_cluster_that_it_is_made_for() -> None:
    layout = check_world(read("sigma-200b-a20b"), 2048)
    assert (layout.pipeline, layout.replicate, layout.shard, layout.expert) == (8, 4, 64, 8)
