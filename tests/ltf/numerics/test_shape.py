"""The small models that stand for large ones."""

import pytest

from ltf.config.read import presets, read
from ltf.model.count import count_parameters
from ltf.numerics import shape


@pytest.mark.parametrize("name", presets())
def test_the_small_model_keeps_what_kernels_depend_on(name: str) -> None:
    config = read(name)
    large, small = config.model, shape.small(config.model)
    assert (small.head_dim, small.heads // small.kv_heads) == (large.head_dim, large.heads // large.kv_heads)
    assert (small.qk_norm, small.tied_embeddings) == (large.qk_norm, large.tied_embeddings)
    assert count_parameters(small).total < 20e6
    if large.moe is not None and small.moe is not None:
        assert small.moe.experts == large.moe.experts
        assert small.moe.score == large.moe.score
        assert small.top_k(small.layers - 1) == large.top_k(
            large.moe.dense_layers + len(small.moe_layers) - 1
        )


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("most", [20_000_000, 100_000_000])
def test_what_is_timed_fits_and_has_full_width_where_it_can(name: str, most: int) -> None:
    large = read(name).model
    timed = shape.timed(large, most)
    assert count_parameters(timed).total <= most
    assert timed.width in (large.width, shape.small(large).width)
    if name == "qwen3-30b-a3b" and most == 100_000_000:
        assert timed.width == large.width


def test_texts_differ_and_stay_in_the_vocabulary() -> None:
    config = read("tiny", ["data.seq_len=8"])
    first, second = shape.texts(config, config.model, 2)
    assert first.tokens.shape == (shape.ROWS, 9)
    assert not first.tokens.equal(second.tokens)
    assert int(first.tokens.max()) < config.model.vocab_size
