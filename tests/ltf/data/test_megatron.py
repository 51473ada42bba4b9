"""Megatron's pairs: written and read as Megatron does, and no damage goes unnamed."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltf.data.errors import DataError
from ltf.data.megatron import TYPES, TokenFile, token_type
from ltf.data.writer import TokenWriter

# Written by IndexedDatasetBuilder of megatron-core 0.16.1: a document of one sequence (7, 300, 5), then one
# of two sequences (1; 2, 3, 4). Hexadecimal .idx and .bin.
FROM_MEGATRON = {
    "int32": (
        "4d4d494449445800000100000000000000040300000000000000030000000000000003000000010000000300000000000000"
        "000000000c000000000000001000000000000000000000000000000001000000000000000300000000000000",
        "070000002c0100000500000001000000020000000300000004000000",
    ),
    "uint16": (
        "4d4d494449445800000100000000000000080300000000000000030000000000000003000000010000000300000000000000"
        "0000000006000000000000000800000000000000000000000000000001000000000000000300000000000000",
        "07002c0105000100020003000400",
    ),
}
# The same with multimodal=True: a mode for each sequence at the end.
MULTIMODAL = (FROM_MEGATRON["int32"][0] + "000001", FROM_MEGATRON["int32"][1])
DOCUMENTS = [[7, 300, 5], [1, 2, 3, 4]]


def place(folder: Path, idx: bytes, data: bytes) -> Path:
    prefix = folder / "corpus"
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(data)
    return prefix


def write(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> TokenFile:
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype))
        writer.finish()
        writer.publish()
    return TokenFile(prefix)


@pytest.mark.parametrize("dtype", FROM_MEGATRON)
def test_a_pair_that_megatron_wrote_reads_as_it_was_meant(tmp_path: Path, dtype: str) -> None:
    idx, data = (bytes.fromhex(text) for text in FROM_MEGATRON[dtype])
    file = TokenFile(place(tmp_path, idx, data))
    file.validate(301)
    assert file.dtype == np.dtype(dtype)
    assert [file.document(number).tolist() for number in range(file.documents)] == DOCUMENTS
    assert (file.tokens, file.sequences, file.documents) == (7, 3, 2)


@pytest.mark.parametrize("dtype", FROM_MEGATRON)
def test_a_pair_that_we_write_is_byte_for_byte_megatrons(tmp_path: Path, dtype: str) -> None:
    with TokenWriter(tmp_path / "corpus", dtype) as writer:
        writer.add(DOCUMENTS[0])
        writer.add(DOCUMENTS[1], [1, 3])
        writer.finish()
        writer.publish()
    idx, data = FROM_MEGATRON[dtype]
    assert (tmp_path / "corpus.idx").read_bytes().hex() == idx
    assert (tmp_path / "corpus.bin").read_bytes().hex() == data


def test_a_multimodal_pair_is_refused_for_what_it_is(tmp_path: Path) -> None:
    prefix = place(tmp_path, *(bytes.fromhex(text) for text in MULTIMODAL))
    with pytest.raises(DataError, match=r"corpus\.idx: byte 94: a multimodal index"):
        TokenFile(prefix)


@pytest.mark.parametrize("code", TYPES)
def test_every_type_of_the_format_is_read_and_floats_are_no_tokens(tmp_path: Path, code: int) -> None:
    dtype = TYPES[code]
    file = write(tmp_path / "corpus", [[1, 2], [3]], dtype.str)
    assert (tmp_path / "corpus.idx").read_bytes()[17] == code
    assert [file.document(n).tolist() for n in (0, 1)] == [[1, 2], [3]]
    if dtype.kind == "f":
        with pytest.raises(DataError, match=r"byte 17: holds float.*token ids are integers"):
            file.validate()
    else:
        file.validate()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=12), max_size=12), data=st.data())
def test_what_is_written_is_read_at_any_place(
    tmp_path: Path, documents: list[list[int]], data: st.DataObject
) -> None:
    file = write(tmp_path / "corpus", documents)
    file.validate()
    stream = [token for document in documents for token in document]
    assert [file.document(n).tolist() for n in range(file.documents)] == documents
    if stream:
        start = data.draw(st.integers(0, len(stream) - 1))
        count = data.draw(st.integers(1, len(stream) - start))
        assert file.read(start, count).tolist() == stream[start : start + count]
        ends = np.cumsum([0, *map(len, documents)])
        expected = {int(end) - start for end in ends[:-1] if start < end < start + count}
        assert file.boundaries(start, count).tolist() == sorted(expected)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Ten documents of 20 tokens; the index has 34 + 40 + 80 + 88 bytes."""
    write(tmp_path / "corpus", [list(range(20))] * 10)
    return tmp_path / "corpus"


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_file_cut_anywhere_is_told_with_its_name_and_length(pair: Path, suffix: str) -> None:
    file = Path(f"{pair}.{suffix}")
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="truncated") as told:
            TokenFile(pair)
        assert (told.value.file, told.value.offset) == (str(file), length)
        assert str(told.value).startswith(f"{file}: byte {length}: ")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_bytes_too_many_are_told(pair: Path, suffix: str) -> None:
    file = Path(f"{pair}.{suffix}")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match=r"2 bytes (too many|more)") as told:
        TokenFile(pair)
    assert (told.value.file, told.value.offset) == (str(file), size)


def damage_of(prefix: Path) -> DataError | None:
    try:
        TokenFile(prefix).validate()
    except DataError as error:
        return error
    return None


def test_any_changed_byte_of_the_index_is_found_but_for_shifts_of_a_document_that_stay_in_order(
    pair: Path,
) -> None:
    """Every byte of header, lengths and pointers; of the document boundaries those that break the order."""
    file = Path(f"{pair}.idx")
    content = file.read_bytes()
    documents_at = 34 + 12 * 10
    unnoticed = []
    for at in range(len(content)):
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[at] ^= flip
            file.write_bytes(damaged)
            told = damage_of(pair)
            if told is None:
                unnoticed.append(at)
            else:
                assert told.file in (str(file), f"{pair}.bin")
                assert told.offset is not None
    assert all(at >= documents_at for at in unnoticed)
    assert all((at - documents_at) % 8 == 0 for at in unnoticed), "only the lowest byte can hide"
    assert documents_at not in unnoticed
    assert len(content) - 8 not in unnoticed


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"PK", "byte 0: not a Megatron index"),
        (9, struct.pack("<Q", 2), "byte 9: version 2, only 1 is known"),
        (17, b"\x09", "byte 17: type code 9, expected 1 to 8"),
        (18, struct.pack("<Q", 2**60), "truncated: 242 bytes, 1152921504606846976 sequences"),
        (26, struct.pack("<Q", 0), "byte 26: no document boundaries"),
        (34 + 8, struct.pack("<i", -1), "byte 42: sequence 2 has length -1"),
        (34 + 8, struct.pack("<i", 21), "byte 98: sequence 3 begins at byte 120 .* add up to 122"),
        (74 + 8, struct.pack("<q", 38), "byte 82: sequence 1 begins at byte 38 of the .bin, .* add up to 40"),
        (154, struct.pack("<q", 1), "byte 154: document 0 begins with sequence 1; expected 0"),
        (162, struct.pack("<q", 9), "byte 170: document 2 begins with sequence 2; expected 9 to 10"),
        (170, struct.pack("<q", 99), "byte 170: document 2 begins with sequence 99; expected 1 to 10"),
        (234, struct.pack("<q", 9), "byte 234: the documents end with sequence 9 of 10"),
    ],
)
def test_each_kind_of_damage_is_told_at_its_byte(pair: Path, at: int, value: bytes, message: str) -> None:
    file = Path(f"{pair}.idx")
    content = bytearray(file.read_bytes())
    content[at : at + len(value)] = value
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        TokenFile(pair).validate()


def test_a_token_beyond_the_vocabulary_is_told_at_its_byte(pair: Path) -> None:
    TokenFile(pair).validate(20)
    with pytest.raises(DataError, match=r"corpus\.bin: byte 38: token id 19 \(token 19\), .* 0 to 18"):
        TokenFile(pair).validate(19)
    with pytest.raises(DataError, match="byte 38: token id 19"):
        TokenFile(pair).scan(19)


def test_a_missing_half_is_told(pair: Path) -> None:
    Path(f"{pair}.bin").unlink()
    with pytest.raises(DataError, match=r"corpus\.bin: no such file"):
        TokenFile(pair)


def test_a_million_documents_open_and_are_checked_within_a_second_in_bounded_memory(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 20, 1_000_000)
    with TokenWriter(tmp_path / "corpus", "<u2") as writer:
        writer.add_documents(np.zeros(int(lengths.sum()), np.uint16), lengths)
        writer.finish()
        writer.publish()
    tracemalloc.start()
    began = time.perf_counter()
    file = TokenFile(tmp_path / "corpus")
    opened = time.perf_counter() - began
    file.validate(10)
    checked = time.perf_counter() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.documents == 1_000_000
    assert opened < 0.2
    assert checked < 1.0
    # Chunks of 2**20 entries, a few at a time; four times the documents would take no more.
    assert peak < 100 << 20
    assert int(file.document_starts(np.array([999_999]))[0]) == lengths[:-1].sum()


def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "corpus", [[1, 2, 3]])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with TokenWriter(tmp_path / "corpus", "<u2") as writer:
        writer.add([4, 5])
        with pytest.raises(ValueError, match="do not fit"):
            writer.add([70_000])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_type_of_tokens_is_the_one_that_megatron_chooses() -> None:
    assert (token_type(258), token_type(65499), token_type(65500)) == (TYPES[8], TYPES[8], TYPES[4])
