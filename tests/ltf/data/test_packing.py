"""Documents into samples of a fixed length: nothing lost, nothing twice, boundaries known."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltf.data.bestfit import best_fit, index_file
from ltf.data.errors import DataError
from ltf.data.megatron import TokenFile
from ltf.data.packing import Packing, Part, pack
from ltf.data.writer import TokenWriter

document_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30)
on_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(prefix: Path, lengths: list[int]) -> TokenFile:
    """Documents whose tokens are all different, so that a sample tells where it came from."""
    with TokenWriter(prefix, np.int32) as writer:
        start = 0
        for length in lengths:
            writer.add(np.arange(start, start + length))
            start += length
        writer.finish()
        writer.publish()
    return TokenFile(prefix)


def whole(file: TokenFile) -> Part:
    return Part.between(file)


def document_of(lengths: list[int]) -> np.ndarray:
    """The document of each token."""
    return np.repeat(np.arange(len(lengths)), lengths)


@on_tmp_path
@given(lengths=document_lengths, seq_len=st.integers(1, 17))
def test_a_stream_gives_every_label_once_and_counts_all_but_those_across_documents(
    tmp_path: Path, lengths: list[int], seq_len: int
) -> None:
    file = write(tmp_path / "corpus", lengths)
    total = sum(lengths)
    if total <= seq_len:
        with pytest.raises(DataError, match="less than one sample"):
            pack(whole(file), seq_len, Packing.STREAM)
        return
    packed = pack(whole(file), seq_len, Packing.STREAM, mask_boundaries=True)
    owner = document_of(lengths)
    labels: list[int] = []
    for index in range(packed.samples):
        sample = packed.sample(index)
        assert np.array_equal(sample.labels, sample.tokens + 1)
        assert np.array_equal(sample.loss_mask, owner[sample.tokens] == owner[sample.labels])
        # Same document, same id; and positions count from the document's first token in this sample.
        _, expected = np.unique(owner[sample.tokens], return_inverse=True)
        assert np.array_equal(sample.document_ids, expected)
        for document in np.unique(expected):
            inside = sample.position_ids[expected == document]
            assert np.array_equal(inside, np.arange(len(inside)))
        labels += sample.labels.tolist()
    assert labels == list(range(1, packed.samples * seq_len + 1))
    assert total - 1 - len(labels) < seq_len


@on_tmp_path
@given(lengths=document_lengths, seq_len=st.integers(1, 17))
def test_best_fit_gives_every_pair_within_a_document_exactly_once(
    tmp_path: Path, lengths: list[int], seq_len: int
) -> None:
    file = write(tmp_path / "corpus", lengths)
    index_file(file, 0, file.documents, seq_len).unlink(missing_ok=True)
    owner = document_of(lengths)
    expected = {(t, t + 1) for t in range(len(owner) - 1) if owner[t] == owner[t + 1]}
    if not expected:
        with pytest.raises(DataError, match="nothing to predict"):
            pack(whole(file), seq_len, Packing.BEST_FIT)
        return
    packed = pack(whole(file), seq_len, Packing.BEST_FIT, mask_boundaries=True, pad=10**6)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(packed.samples):
        sample = packed.sample(index)
        assert len(sample.tokens) == seq_len
        real = sample.loss_mask == 1
        assert (sample.tokens[~real] == 10**6).all()
        seen.update(zip(sample.tokens[real].tolist(), sample.labels[real].tolist(), strict=True))
        # One id for one document, and padding by itself.
        padded = np.where(real, owner[np.minimum(sample.tokens, len(owner) - 1)], -1)
        pairs = set(zip(sample.document_ids.tolist(), padded.tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert set(seen) == expected
    assert set(seen.values()) == {1}


def test_best_fit_cuts_only_documents_that_are_longer_than_a_sample(tmp_path: Path) -> None:
    lengths = [9, 4, 25, 8, 5, 9, 2, 3]
    file = write(tmp_path / "corpus", lengths)
    packed = pack(whole(file), 8, Packing.BEST_FIT)
    owner = document_of(lengths)
    homes: dict[int, set[int]] = {}
    for index in range(packed.samples):
        sample = packed.sample(index)
        for token in sample.tokens[sample.loss_mask == 1]:
            homes.setdefault(int(owner[token]), set()).add(index)
    assert {document for document, where in homes.items() if len(where) > 1} == {2}


@given(
    sizes=st.lists(st.integers(1, 30), max_size=60),
    spare=st.integers(0, 10),
)
def test_bins_are_filled_as_best_fit_decreasing_one_item_at_a_time_would(
    sizes: list[int], spare: int
) -> None:
    capacity = max(sizes, default=1) + spare
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    bins = best_fit(np.array(sizes, np.int64), capacity)
    filled = np.bincount(bins, weights=sizes).astype(int) if sizes else np.zeros(0, int)
    assert sorted((capacity - filled).tolist()) == sorted(rooms)


@pytest.mark.parametrize("packing", list(Packing))
def test_without_masked_boundaries_a_sample_is_one_document(tmp_path: Path, packing: Packing) -> None:
    packed = pack(whole(write(tmp_path / "corpus", [5, 5, 5])), 8, packing)
    sample = packed.sample(0)
    assert sample.document_ids.tolist() == [0] * 8
    assert sample.position_ids.tolist() == list(range(8))


def test_parts_between_the_same_fraction_share_no_document_and_lose_none(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus", [3] * 50)
    low, high = Part.between(file, (0.0, 0.9)), Part.between(file, (0.9, 1.0))
    assert (low.tokens, high.tokens) == (range(135), range(135, 150))
    for packing in Packing:
        packed = pack(high, 2, packing)
        tokens = {int(t) for i in range(packed.samples) for t in packed.sample(i).tokens}
        assert min(tokens) >= 135


def test_the_packing_index_is_made_once_and_anew_when_the_corpus_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus", [5, 6, 7])
    first = pack(whole(file), 8, Packing.BEST_FIT).samples
    kept = index_file(file, 0, file.documents, 8)
    made = kept.stat().st_ino
    pack(whole(file), 8, Packing.BEST_FIT)
    os.utime(file.idx)
    pack(whole(TokenFile(tmp_path / "corpus")), 8, Packing.BEST_FIT)
    assert kept.stat().st_ino == made, "the same content needs no new index"
    changed = write(tmp_path / "corpus", [9, 9, 9, 9])
    assert pack(whole(changed), 8, Packing.BEST_FIT).samples == 4 != first
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("at", [0, 9, 60, 110, 130, -1])
def test_a_damaged_packing_index_is_made_anew(tmp_path: Path, at: int) -> None:
    file = write(tmp_path / "corpus", [5, 6, 7, 30])
    before = [pack(whole(file), 8, Packing.BEST_FIT).sample(i).tokens.tolist() for i in range(5)]
    kept = index_file(file, 0, file.documents, 8)
    data = bytearray(kept.read_bytes())
    data[at] ^= 0x10
    kept.write_bytes(data)
    assert [pack(whole(file), 8, Packing.BEST_FIT).sample(i).tokens.tolist() for i in range(5)] == before
    kept.write_bytes(data[:at])
    assert [pack(whole(file), 8, Packing.BEST_FIT).sample(i).tokens.tolist() for i in range(5)] == before


def test_the_packing_index_goes_to_the_folder_that_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "corpus", [5, 6, 7])
    pack(whole(file), 8, Packing.BEST_FIT, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("corpus.*.pack"))) == 1
    assert not list((tmp_path / "a").glob("*.pack"))
    (tmp_path / "blocked").write_text("not a folder")
    with pytest.raises(DataError, match="name a writable folder"):
        pack(whole(file), 8, Packing.BEST_FIT, cache=tmp_path / "blocked")
