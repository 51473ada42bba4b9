"""Blends and batches: checked before the first, the same at any number of ranks, resumed by one number."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltf.data.dataset import Dataset, Source
from ltf.data.errors import DataError
from ltf.data.inputs import Documents
from ltf.data.loader import Loader
from ltf.data.packing import Packing
from ltf.data.prepare import Recipe, prepare
from ltf.data.writer import TokenWriter

pytestmark = pytest.mark.torch
SEQ_LEN = 4


def write(prefix: Path, first: int, tokens: int) -> Path:
    """Consecutive token ids in documents of 10."""
    with TokenWriter(prefix, np.int32) as writer:
        for start in range(first, first + tokens, 10):
            writer.add(np.arange(start, min(start + 10, first + tokens)))
        writer.finish()
        writer.publish()
    return prefix


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Two corpora of 25 and 50 samples, whose tokens tell them apart."""
    return [
        Source(write(tmp_path / "a", 0, 101), weight=0.25),
        Source(write(tmp_path / "b", 1000, 201), weight=0.75),
    ]


def dataset(sources: list[Source], **options: object) -> Dataset:
    chosen: dict[str, object] = {"seq_len": SEQ_LEN, "seed": 3, "vocabulary": 2000} | options
    return Dataset(sources, **chosen)  # type: ignore[arg-type]


def first_tokens(loader: Loader, step: int, world: int) -> list[int]:
    """The first token of each sample that the ranks of a step get, in the order of their ranks."""
    each = loader.global_batch // world // loader.micro_batch
    return [
        int(token)
        for rank in range(world)
        for micro in range(each)
        for token in loader.batch(step, rank, world, micro).tokens[:, 0]
    ]


def test_a_run_resumed_at_another_number_of_ranks_sees_exactly_the_samples_that_were_left(
    sources: list[Source],
) -> None:
    whole = dataset(sources)
    prefix = [int(whole.sample(index).tokens[0]) for index in range(8 * 24)]
    seen: list[int] = []
    for step in range(8):
        world = (1, 8, 2, 6, 3, 12, 4, 24)[step]
        fresh = Loader(dataset(sources), global_batch=24, micro_batch=1)
        seen += first_tokens(fresh, step, world)
    assert seen == prefix


def test_each_epoch_gives_each_sample_of_a_source_once_in_another_order(sources: list[Source]) -> None:
    blend = dataset(sources)
    places = [blend.place(index) for index in range(100 * 3)]
    orders = [[p.index for p in places if (p.source, p.epoch) == (0, epoch)] for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(25)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert blend.epochs(300) == [3.0, 4.5]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(index=st.integers(0, 10**13))
def test_a_sample_far_ahead_is_the_one_that_it_would_be_on_arrival(sources: list[Source], index: int) -> None:
    one, other = dataset(sources), dataset(sources)
    other.sample(max(index - 1, 0))
    assert one.place(index) == other.place(index)
    assert np.array_equal(one.sample(index).tokens, other.sample(index).tokens)


def test_batches_are_int64_tensors_whose_labels_are_the_next_tokens(sources: list[Source]) -> None:
    batch = Loader(dataset(sources, mask_boundaries=True), global_batch=8, micro_batch=4).batch(0, 1, 2, 0)
    assert batch.samples == (4, 5, 6, 7)
    for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.document_ids, batch.position_ids):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (4, SEQ_LEN)
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert torch.equal(batch.loss_mask == 0, batch.labels % 10 == 0)


def test_another_seed_gives_another_order_and_without_shuffling_it_is_the_files(
    sources: list[Source],
) -> None:
    def tokens(**options: object) -> list[int]:
        one = dataset(sources[:1], **options)
        return [int(one.sample(index).tokens[0]) for index in range(25)]

    assert tokens(shuffle=False) == list(range(0, 100, SEQ_LEN))
    assert sorted(tokens(seed=1)) == sorted(tokens(seed=2)) == tokens(shuffle=False)
    assert tokens(seed=1) != tokens(seed=2)


def test_reading_ahead_gives_what_reading_gives_in_the_same_order(sources: list[Source]) -> None:
    loader = Loader(dataset(sources), global_batch=8, micro_batch=2)
    with loader.reading_ahead(loader.steps(16, rank=1, world=2)) as batches:
        ahead = [next(batches) for _ in range(5)]
    assert [batch.samples for batch in ahead] == [(20, 21), (22, 23), (28, 29), (30, 31), (36, 37)]
    for batch in ahead:
        assert torch.equal(batch.tokens, loader.read(batch.samples).tokens)
    assert not [thread for thread in threading.enumerate() if thread.name == "data"]


def test_a_batch_that_the_ranks_cannot_share_is_refused_before_anything_is_read(
    sources: list[Source],
) -> None:
    loader = Loader(dataset(sources), global_batch=8, micro_batch=2)
    with pytest.raises(DataError, match="8 samples does not divide among 3 data-parallel ranks"):
        loader.steps(0, rank=0, world=3)
    with pytest.raises(DataError, match="1 samples a rank do not divide into micro-batches of 2"):
        loader.steps(0, rank=0, world=8)


def test_reading_ahead_stops_at_its_bound_and_ends_with_what_was_wanted(sources: list[Source]) -> None:
    asked = threading.Semaphore(0)

    def wanted() -> Iterator[range]:
        for start in range(6):
            asked.release()
            yield range(start, start + 1)

    loader = Loader(dataset(sources), global_batch=8, micro_batch=1, ahead=2)
    with loader.reading_ahead(wanted()) as batches:
        # Two wait in the queue and a third, made, for its place; the fourth is not asked for.
        for _ in range(3):
            assert asked.acquire(timeout=10)
        assert not asked.acquire(timeout=0.2)
        assert [batch.samples for batch in batches] == [(start,) for start in range(6)]


def test_what_breaks_while_reading_ahead_is_raised_where_the_batch_would_have_come(
    sources: list[Source],
) -> None:
    blend = dataset(sources, shuffle=False)
    with Path(f"{sources[1].prefix}.bin").open("r+b") as file:
        file.seek(4 * 10)
        file.write((2_000_000).to_bytes(4, "little"))
    broken = next(i for i in range(100) if 2_000_000 in blend_tokens(blend, i))
    loader = Loader(blend, global_batch=8, micro_batch=1)
    with loader.reading_ahead(range(i, i + 1) for i in range(100)) as batches:
        for _ in range(broken):
            next(batches)
        with pytest.raises(DataError, match=r"b\.bin: sample 2 holds token id 2000000"):
            next(batches)


def blend_tokens(blend: Dataset, index: int) -> list[int]:
    place = blend.place(index)
    return blend.files[place.source].read(place.index * SEQ_LEN, SEQ_LEN + 1).tolist()


def test_the_time_that_a_batch_was_waited_for_is_told(sources: list[Source]) -> None:
    now = iter([10.0, 10.5, 20.0, 22.0])
    loader = Loader(dataset(sources), global_batch=2, micro_batch=1, clock=lambda: next(now))
    loader.read([0])
    loader.read([1])
    stall = loader.stall
    assert (stall.total, stall.last, stall.longest, stall.batches) == (2.5, 2.0, 2.0, 2)


def test_a_run_that_repeats_a_source_too_often_is_refused_before_it_starts(sources: list[Source]) -> None:
    limited = [sources[0], Source(sources[1].prefix, weight=0.75, max_epochs=3)]
    dataset(limited).check_length(200)
    with pytest.raises(
        DataError, match=r"b: a run of 204 samples passes 3.06 times over its 50, max_epochs is 3"
    ):
        dataset(limited).check_length(204)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 1100}, r"b\.bin: byte 400: token id 1100"),
        ({"seq_len": 500}, r"a\.bin: 101 tokens in 11 documents are less than one sample of 500 \+ 1"),
        ({"seq_len": 0}, "seq_len 0: expected at least 1"),
        ({"packing": Packing.BEST_FIT, "pad": 2000}, "padding token 2000: ids are 0 to 1999"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_when_it_is_opened(
    sources: list[Source], options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataset(sources, **options)


def test_weights_for_some_sources_only_are_refused_and_none_means_by_size(sources: list[Source]) -> None:
    bare = [Source(source.prefix) for source in sources]
    assert dataset(bare).schedule.parts == [1, 2]
    with pytest.raises(DataError, match="a: has no weight, but others have"):
        dataset([bare[0], sources[1]])


def prepared(folder: Path, name: str, **recipe: object) -> Path:
    text = folder / f"{name}.txt"
    text.write_text("\n".join(f"line {number} of {name}" for number in range(50)))
    chosen = Recipe(documents=Documents.LINE, **recipe)  # type: ignore[arg-type]
    prepare([text], folder / name, chosen)
    return folder / name


def test_a_corpus_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, "c")
    dataset([Source(prefix)], vocabulary=258)
    with pytest.raises(DataError, match="made with a vocabulary of 258, the model has 257"):
        dataset([Source(prefix)], vocabulary=257)
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    # A document that begins one sequence later: in order, so that only the digest can tell.
    content[-16] += 1
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.idx: SHA-256 is .* the file changed after it was written"):
        dataset([Source(prefix)], vocabulary=258)


def test_corpora_of_different_tokenizers_are_not_blended(tmp_path: Path) -> None:
    one, two = prepared(tmp_path, "one"), prepared(tmp_path, "two")
    manifest = Path(f"{two}.json")
    manifest.write_text(manifest.read_text().replace('"bytes",', '"sha256:0",', 1))
    with pytest.raises(DataError, match=r"two: made with tokenizer sha256:0, but .*one with bytes"):
        dataset([Source(one), Source(two)], vocabulary=258)
