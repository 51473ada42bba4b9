"""Samples of a fixed length from documents of any length, any one of them at once.

*Stream*: the documents end to end, cut every ``seq_len`` tokens; each sample holds one token more, so that
every token but the first is a label once an epoch. A rest shorter than a sample at the very end is left out.

*Best fit*: documents stay whole where they fit. What a model learns from is pairs (token, next token within
the same document); a sample holds at most ``seq_len`` pairs. A document of more pairs gives full samples and
one rest; rests are put together by best-fit decreasing (``bestfit.py``). Every pair comes exactly once an
epoch, none spans two documents, and what stays free is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ltf.data.bestfit import PackIndex
from ltf.data.errors import DataError
from ltf.data.megatron import TokenFile

Int64s = npt.NDArray[np.int64]


class Packing(Enum):
    STREAM = "stream"
    BEST_FIT = "best_fit"


@dataclass(frozen=True)
class Sample:
    """``seq_len`` positions, all int64.

    ``loss_mask`` is 1 where the label counts. ``document_ids`` number the documents of this sample from 0
    (padding is one more document of its own) and ``position_ids`` count from each one's first token here.
    Without masked boundaries there is one document.
    """

    tokens: Int64s
    labels: Int64s
    loss_mask: Int64s
    document_ids: Int64s
    position_ids: Int64s


class Packed(Protocol):
    """A part of a token file, as samples."""

    @property
    def samples(self) -> int: ...
    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Part:
    """Documents ``first`` to ``end`` - 1 of a file."""

    file: TokenFile
    first: int
    end: int

    @classmethod
    def between(cls, file: TokenFile, fractions: tuple[float, float] = (0.0, 1.0)) -> Part:
        """The documents between two fractions of their number: neighbours in a chain share no document."""
        low, high = fractions
        if not 0 <= low < high <= 1:
            raise DataError(
                f"documents from {low} to {high}: expected fractions with 0 <= from < to <= 1", file.prefix
            )
        return cls(file, round(low * file.documents), round(high * file.documents))

    @property
    def tokens(self) -> range:
        """Positions in the stream."""
        start, end = self.file.document_starts(np.array([self.first, self.end]))
        return range(int(start), int(end))


class Stream:
    """Samples cut from the documents end to end."""

    def __init__(self, part: Part, seq_len: int, *, mask_boundaries: bool = False) -> None:
        self._part, self._seq_len, self._mask_boundaries = part, seq_len, mask_boundaries
        self._start, tokens = part.tokens.start, len(part.tokens)
        self._samples = max(tokens - 1, 0) // seq_len
        if not self._samples:
            raise DataError(
                f"{tokens} tokens in {part.end - part.first} documents are less than one sample of "
                f"{seq_len} + 1: take a shorter seq_len or more data",
                part.file.bin,
            )

    @property
    def samples(self) -> int:
        return self._samples

    def sample(self, index: int) -> Sample:
        seq_len = self._seq_len
        start = self._start + _checked(index, self._samples) * seq_len
        tokens = self._part.file.read(start, seq_len + 1).astype(np.int64)
        begins = (
            self._part.file.boundaries(start, seq_len + 1) if self._mask_boundaries else np.zeros(0, np.int64)
        )
        loss_mask = np.ones(seq_len, np.int64)
        loss_mask[begins - 1] = 0
        return _sample(tokens[:-1], tokens[1:], loss_mask, begins[begins < seq_len])


class BestFit:
    """Samples of whole documents, from an index that is made once and kept beside the corpus."""

    def __init__(
        self,
        part: Part,
        seq_len: int,
        *,
        mask_boundaries: bool = False,
        pad: int = 0,
        cache: Path | None = None,
    ) -> None:
        self._part, self._seq_len, self._mask_boundaries, self._pad = part, seq_len, mask_boundaries, pad
        self.index = PackIndex.open(part.file, part.first, part.end, seq_len, cache)
        if not self.index.samples:
            raise DataError("no document of two tokens or more: nothing to predict", part.file.bin)

    @property
    def samples(self) -> int:
        return self.index.samples

    def sample(self, index: int) -> Sample:
        starts, lengths = self.index.pieces(_checked(index, self.index.samples))
        tokens = np.full(self._seq_len, self._pad, np.int64)
        labels = np.full(self._seq_len, self._pad, np.int64)
        loss_mask = np.zeros(self._seq_len, np.int64)
        begins, at = [], 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            piece = self._part.file.read(start, length + 1)
            tokens[at : at + length], labels[at : at + length] = piece[:-1], piece[1:]
            begins.append(at)
            at += length
        loss_mask[:at] = 1
        if at < self._seq_len:
            begins.append(at)
        return _sample(
            tokens, labels, loss_mask, np.array(begins[1:] if self._mask_boundaries else [], np.int64)
        )


def pack(
    part: Part,
    seq_len: int,
    packing: Packing,
    *,
    mask_boundaries: bool = False,
    pad: int = 0,
    cache: Path | None = None,
) -> Packed:
    if seq_len < 1:
        raise DataError(f"seq_len {seq_len}: expected at least 1")
    match packing:
        case Packing.STREAM:
            return Stream(part, seq_len, mask_boundaries=mask_boundaries)
        case Packing.BEST_FIT:
            return BestFit(part, seq_len, mask_boundaries=mask_boundaries, pad=pad, cache=cache)


def _sample(tokens: Int64s, labels: Int64s, loss_mask: Int64s, begins: Int64s) -> Sample:
    """``begins``: the positions after 0 at which a document begins, ascending."""
    positions = np.arange(len(tokens))
    document_ids = np.searchsorted(begins, positions, side="right")
    position_ids = positions - np.concatenate([[0], begins])[document_ids]
    return Sample(tokens, labels, loss_mask, document_ids, position_ids)


def _checked(index: int, samples: int) -> int:
    if not 0 <= index < samples:
        raise IndexError(f"sample {index} of {samples}")
    return index
