"""Writes Megatron's token files so that a reader finds either a whole pair or none."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError
from ltf.data.megatron import CHUNK, MAGIC, TYPES, VERSION, Int64s, Tokens, bin_file, idx_file


@dataclass(frozen=True)
class WrittenFile:
    name: str
    bytes: int
    sha256: str


class TokenWriter:
    """Writes a pair so that ``PREFIX.idx`` exists only when both files are whole and on the disk.

    Used as a context manager: leaving it without ``publish`` leaves nothing behind. Memory does not grow with
    the number of documents.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next((code for code, known in TYPES.items() if known == self.dtype), None)
        if self._code is None:
            raise DataError(f"type {self.dtype} is unknown to Megatron's format", idx_file(prefix))
        self.documents = self.sequences = self.tokens = 0
        parent = Path(self.prefix).parent
        parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f".{Path(self.prefix).name}.", suffix=".part", dir=parent))
        self._tokens: IO[bytes] = (self._work / "bin").open("wb")
        self._lengths: IO[bytes] = (self._work / "lengths").open("w+b")
        self._boundaries: IO[bytes] = (self._work / "documents").open("w+b")
        self._boundaries.write(struct.pack("<q", 0))
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, tokens: npt.ArrayLike, sequence_lengths: npt.ArrayLike | None = None) -> None:
        """One document; of several sequences if their lengths are given."""
        flat = np.asarray(tokens)
        lengths = np.asarray([len(flat)] if sequence_lengths is None else sequence_lengths, np.int64)
        if int(lengths.sum()) != len(flat) or (lengths < 0).any():
            raise ValueError(f"sequence lengths {lengths.tolist()} for {len(flat)} tokens")
        self.add_sequences(flat, lengths)
        self._boundaries.write(struct.pack("<q", self.sequences))
        self.documents += 1

    def add_documents(self, tokens: Tokens, lengths: Int64s) -> None:
        """Many documents of one sequence each: their tokens end to end, and the length of each."""
        first = self.sequences + 1
        self.add_sequences(tokens, lengths)
        self._boundaries.write(np.arange(first, self.sequences + 1, dtype="<i8").tobytes())
        self.documents += len(lengths)

    def add_sequences(self, tokens: Tokens, lengths: Int64s) -> None:
        """Sequences of the document that ``add`` would end; most callers want ``add``."""
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        if (
            limits is not None
            and len(tokens)
            and not (limits.min <= tokens.min() <= tokens.max() <= limits.max)
        ):
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise ValueError(f"a sequence of {lengths.max()} tokens; the format holds at most 2**31 - 1")
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._digest.update(data)
        self._tokens.write(data)
        self._lengths.write(np.asarray(lengths, "<i4").tobytes())
        self.tokens += len(tokens)
        self.sequences += len(lengths)

    def finish(self) -> tuple[WrittenFile, WrittenFile]:
        """Make both files durable in a folder beside the output; their sizes and digests (bin, idx)."""
        _sync_and_close(self._tokens)
        digest = hashlib.sha256()
        with (self._work / "idx").open("wb") as index:

            def write(data: bytes) -> None:
                digest.update(data)
                index.write(data)

            write(MAGIC + struct.pack("<QBQQ", VERSION, self._code, self.sequences, self.documents + 1))
            for data in _chunks(self._lengths, 4):
                write(data)
            position = 0
            for data in _chunks(self._lengths, 4):
                ends = position + np.cumsum(np.frombuffer(data, "<i4"), dtype=np.int64) * self.dtype.itemsize
                write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
                position = int(ends[-1])
            for data in _chunks(self._boundaries, 8):
                write(data)
            index.flush()
            os.fsync(index.fileno())
            size = index.tell()
        self._lengths.close()
        self._boundaries.close()
        return (
            WrittenFile(
                bin_file(self.prefix).name, self.tokens * self.dtype.itemsize, self._digest.hexdigest()
            ),
            WrittenFile(idx_file(self.prefix).name, size, digest.hexdigest()),
        )

    def publish(self) -> None:
        """Move both files, which ``finish`` made, to their places: the old index goes first, the new comes
        last.

        A crash in between leaves a ``.bin`` without an ``.idx``, which no reader takes for a corpus.
        """
        idx_file(self.prefix).unlink(missing_ok=True)
        (self._work / "bin").replace(bin_file(self.prefix))
        sync_folder(Path(self.prefix).parent)
        (self._work / "idx").replace(idx_file(self.prefix))
        sync_folder(Path(self.prefix).parent)

    def discard(self) -> None:
        """Remove what was not published."""
        for file in (self._tokens, self._lengths, self._boundaries):
            file.close()
        shutil.rmtree(self._work, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """A rename is durable only when its folder is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _chunks(file: IO[bytes], width: int) -> Iterator[bytes]:
    file.seek(0)
    while data := file.read(CHUNK * width):
        yield data
