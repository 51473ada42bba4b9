"""Megatron's indexed token files: ``PREFIX.bin`` (tokens) and ``PREFIX.idx`` (where documents begin and end).

Layout of the index, little endian, as Megatron-LM's ``megatron/core/datasets/indexed_dataset.py`` writes it::

    0   9 bytes   b"MMIDIDX\\0\\0"
    9   uint64    version, 1
    17  uint8     code of the tokens' type (``TYPES``)
    18  uint64    S, number of sequences
    26  uint64    D, number of document boundaries: documents + 1
    34  S int32   tokens in each sequence
        S int64   byte at which each sequence begins in the .bin
        D int64   the sequence with which each document begins; the last is S
        S int8    only in multimodal files, and no field says so: the mode of each sequence

Sequences lie end to end in the ``.bin``. Megatron's own writer and merger lay them so, and it makes each
field of the index checkable against the others; a file that is laid out otherwise is refused.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
# Entries looked at together: bounds the memory of every pass over an index or a token file.
CHUNK = 1 << 20
# Megatron's own limit for 16 bits (DType.optimal_dtype): files of either can be merged.
LARGEST_16_BIT_VOCABULARY = 65499

Int64s = npt.NDArray[np.int64]
Tokens = npt.NDArray[Any]


def bin_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def token_type(vocabulary: int) -> np.dtype[Any]:
    """The smallest type that Megatron would choose for so many token ids."""
    return TYPES[8] if vocabulary <= LARGEST_16_BIT_VOCABULARY else TYPES[4]


class TokenFile:
    """A ``.bin/.idx`` pair, memory-mapped: a stream of ``tokens`` tokens that ``documents`` documents share.

    Opening reads the header and checks the sizes of both files; ``validate`` reads the whole index.
    Raises ``DataError`` that names file and byte.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx, self.bin = idx_file(prefix), bin_file(prefix)
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise DataError("no such file; a corpus is a pair PREFIX.idx and PREFIX.bin", file)
        self.dtype, self.sequences, boundaries = _header(self.idx)
        self.documents = boundaries - 1
        _check_index_size(self.idx, self.sequences, boundaries)
        self._lengths_at = HEADER_BYTES
        self._pointers_at = self._lengths_at + 4 * self.sequences
        self._documents_at = self._pointers_at + 8 * self.sequences
        whole = np.memmap(self.idx, np.uint8, "r")
        self.sequence_lengths: npt.NDArray[np.int32] = whole[self._lengths_at : self._pointers_at].view("<i4")
        self.sequence_pointers: Int64s = whole[self._pointers_at : self._documents_at].view("<i8")
        self.document_indices: Int64s = whole[self._documents_at :].view("<i8")
        self.tokens = self._token_count()
        self._stream: Tokens = (
            np.memmap(self.bin, self.dtype, "r") if self.tokens else np.zeros(0, self.dtype)
        )

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, count: int) -> Tokens:
        """The ``count`` tokens from position ``start`` of the stream, in the file's own type, not copied."""
        if start < 0 or count < 0 or start + count > self.tokens:
            end = start + count
            raise DataError(f"tokens {start} to {end} were asked for, {self.tokens} are there", self.bin)
        return self._stream[start : start + count]

    def document(self, number: int) -> Tokens:
        """The tokens of one document."""
        start, end = self.document_starts(np.array([number, number + 1]))
        return self.read(int(start), int(end - start))

    def document_starts(self, numbers: Int64s) -> Int64s:
        """Position in the stream, in tokens, at which each of the documents begins; ``documents`` gives the
        end."""
        sequence = self.document_indices[numbers]
        inside = sequence < self.sequences
        starts = np.full(len(sequence), self.tokens, np.int64)
        starts[inside] = self.sequence_pointers[sequence[inside]] // self.dtype.itemsize
        return starts

    def document_at(self, position: int) -> int:
        """The document that holds the token at ``position``, by bisection: a handful of pages are read."""
        byte = position * self.dtype.itemsize
        end = self.tokens * self.dtype.itemsize
        low, high = 0, self.documents
        while high - low > 1:
            middle = (low + high) // 2
            sequence = int(self.document_indices[middle])
            begins = int(self.sequence_pointers[sequence]) if sequence < self.sequences else end
            if begins <= byte:
                low = middle
            else:
                high = middle
        return low

    def boundaries(self, start: int, count: int) -> Int64s:
        """Where documents begin within ``start < position < start + count``, relative to ``start``.

        An empty document begins where the next one does, and that position comes once.
        """
        first = self.document_at(start)
        last = self.document_at(start + count - 1)
        positions = self.document_starts(np.arange(first + 1, last + 1)) - start
        return np.unique(positions[(positions > 0) & (positions < count)])

    def validate(self, vocabulary: int | None = None) -> None:
        """Read the whole index, in bounded memory, and look at token ids across the stream.

        With ``vocabulary``, 256 stretches of 4,096 tokens, spread evenly, must hold ids below it.
        ``scan`` looks at every token.
        """
        if self.dtype.kind == "f":
            raise DataError(f"holds {self.dtype.name} values; token ids are integers", self.idx, 17)
        self._check_sequences()
        self._check_documents()
        if vocabulary is not None:
            stretch, places = 4096, 256
            last = max(self.tokens - stretch, 0)
            for start in sorted({last * k // (places - 1) for k in range(places)}):
                self.check_tokens(start, min(stretch, self.tokens - start), vocabulary)

    def scan(self, vocabulary: int) -> None:
        """Check every token id: 0 to ``vocabulary`` - 1."""
        for start in range(0, self.tokens, CHUNK):
            self.check_tokens(start, min(CHUNK, self.tokens - start), vocabulary)

    def check_tokens(self, start: int, count: int, vocabulary: int) -> None:
        tokens = self.read(start, count)
        if not count or (int(tokens.max()) < vocabulary and int(tokens.min()) >= 0):
            return
        wrong = int(np.flatnonzero((tokens >= vocabulary) | (tokens < 0))[0])
        raise DataError(
            f"token id {tokens[wrong]} (token {start + wrong}), but ids are 0 to {vocabulary - 1}: "
            "another tokenizer's corpus, or a damaged file",
            self.bin,
            (start + wrong) * self.dtype.itemsize,
        )

    def _token_count(self) -> int:
        """From the last sequence's end, which must be the end of the ``.bin``."""
        size = self.bin.stat().st_size
        end = 0
        if self.sequences:
            at = self._pointers_at - 4
            length, pointer = int(self.sequence_lengths[-1]), int(self.sequence_pointers[-1])
            if length < 0:
                raise DataError(f"sequence {self.sequences - 1} has length {length}", self.idx, at)
            end = pointer + length * self.dtype.itemsize
            if pointer < 0 or pointer % self.dtype.itemsize:
                raise DataError(
                    f"sequence {self.sequences - 1} begins at byte {pointer} of the .bin",
                    self.idx,
                    self._documents_at - 8,
                )
        if size < end:
            raise DataError(f"truncated: {size} bytes, the index needs {end}", self.bin, size)
        if size > end:
            raise DataError(
                f"{size - end} bytes more than the index accounts for ({end}): {self.idx.name} belongs to "
                "another file, or was cut short",
                self.bin,
                end,
            )
        return end // self.dtype.itemsize

    def _check_sequences(self) -> None:
        expected = 0
        for start in range(0, self.sequences, CHUNK):
            lengths = self.sequence_lengths[start : start + CHUNK].astype(np.int64)
            pointers = self.sequence_pointers[start : start + CHUNK]
            negative = np.flatnonzero(lengths < 0)
            if negative.size:
                i = int(negative[0])
                raise DataError(
                    f"sequence {start + i} has length {lengths[i]}",
                    self.idx,
                    self._lengths_at + 4 * (start + i),
                )
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            begins = np.concatenate([[expected], ends[:-1]])
            astray = np.flatnonzero(pointers != begins)
            if astray.size:
                i = int(astray[0])
                raise DataError(
                    f"sequence {start + i} begins at byte {pointers[i]} of the .bin, but the lengths before "
                    f"it add up to {begins[i]}",
                    self.idx,
                    self._pointers_at + 8 * (start + i),
                )
            expected = int(ends[-1])

    def _check_documents(self) -> None:
        previous = 0
        for start in range(0, self.documents + 1, CHUNK):
            indices = self.document_indices[start : start + CHUNK]
            before = np.concatenate([[previous], indices[:-1]])
            wrong = np.flatnonzero((indices < before) | (indices > self.sequences))
            if start == 0 and indices[0] != 0:
                wrong = np.array([0])
            if wrong.size:
                i = int(wrong[0])
                raise DataError(
                    f"document {start + i} begins with sequence {indices[i]}; expected "
                    f"{'0' if start + i == 0 else f'{before[i]} to {self.sequences}'}",
                    self.idx,
                    self._documents_at + 8 * (start + i),
                )
            previous = int(indices[-1])
        if previous != self.sequences:
            raise DataError(
                f"the documents end with sequence {previous} of {self.sequences}",
                self.idx,
                self._documents_at + 8 * self.documents,
            )


def _header(idx: Path) -> tuple[np.dtype[Any], int, int]:
    with idx.open("rb") as file:
        header = file.read(HEADER_BYTES)
    magic = header[: len(MAGIC)]
    if magic != MAGIC[: len(magic)]:
        raise DataError(f"not a Megatron index: begins with {magic!r}, expected {MAGIC!r}", idx, 0)
    if len(header) < HEADER_BYTES:
        raise DataError(f"truncated: {len(header)} bytes, the header has {HEADER_BYTES}", idx, len(header))
    version, code, sequences, boundaries = struct.unpack("<QBQQ", header[len(MAGIC) :])
    if version != VERSION:
        raise DataError(f"version {version}, only {VERSION} is known", idx, 9)
    if code not in TYPES:
        raise DataError(f"type code {code}, expected {min(TYPES)} to {max(TYPES)}", idx, 17)
    if boundaries < 1:
        raise DataError("no document boundaries; even an empty corpus has one", idx, 26)
    return TYPES[code], sequences, boundaries


def _check_index_size(idx: Path, sequences: int, boundaries: int) -> None:
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    size = idx.stat().st_size
    counts = f"{sequences} sequences and {boundaries} document boundaries"
    if size < expected:
        raise DataError(f"truncated: {size} bytes, {counts} need {expected}", idx, size)
    if size == expected + sequences and sequences:
        raise DataError(
            f"a multimodal index (one mode byte for each of {sequences} sequences after the documents); "
            "only text corpora can be trained on",
            idx,
            expected,
        )
    if size > expected:
        raise DataError(f"{size - expected} bytes too many: {counts} need {expected}", idx, expected)
