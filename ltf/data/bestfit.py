"""The index of whole-document packing: which stretches of the token stream make up each sample.

It is a function of the corpus' index and the sample length alone. It is made once, in bounded memory, and
kept in a file; it is made anew when the corpus' index changed (size, and modification time or digest) or when
the file is damaged.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError
from ltf.data.megatron import CHUNK, TokenFile
from ltf.data.writer import sync_folder

Int64s = npt.NDArray[np.int64]
MAGIC = b"LTFPACK1"
# magic; seq_len, first document, end document, size and time of the .idx; its SHA-256; samples, pieces,
# CRC-32.
HEADER = struct.Struct("<8s5q32s3q")
# Documents packed together. More would hardly fill samples better and cost about 100 bytes of memory each.
GROUP = 1 << 19


@dataclass(frozen=True)
class PackIndex:
    """Sample i is made of pieces ``ends[i - 1]`` to ``ends[i]`` - 1.

    A piece of ``lengths[p]`` pairs begins at token ``starts[p]`` of the stream and holds ``lengths[p] + 1``
    tokens.
    """

    ends: Int64s
    starts: Int64s
    lengths: npt.NDArray[np.int32]

    @property
    def samples(self) -> int:
        return len(self.ends)

    def pieces(self, sample: int) -> tuple[Int64s, npt.NDArray[np.int32]]:
        first = int(self.ends[sample - 1]) if sample else 0
        end = int(self.ends[sample])
        return self.starts[first:end], self.lengths[first:end]

    @classmethod
    def open(cls, file: TokenFile, first: int, end: int, seq_len: int, cache: Path | None = None) -> Self:
        """From the file that an earlier call left, or made now and left for the next call.

        Several processes may do this at once: each makes the same file and moves it into place whole.
        """
        path = index_file(file, first, end, seq_len, cache)
        index = cls._load(path, file, first, end, seq_len)
        if index is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _build(path, file, first, end, seq_len)
            except OSError as error:
                raise DataError(
                    f"cannot keep the packing index here ({error.strerror}): name a writable folder for it",
                    path,
                ) from error
            index = cls._load(path, file, first, end, seq_len)
            if index is None:
                raise DataError("the packing index reads otherwise than it was written", path)
        return index

    @classmethod
    def _load(cls, path: Path, file: TokenFile, first: int, end: int, seq_len: int) -> Self | None:
        """None if there is none, or it is another's, outdated or damaged."""
        if not path.is_file() or path.stat().st_size < HEADER.size:
            return None
        whole = np.memmap(path, np.uint8, "r")
        magic, *key, size, time, digest, samples, pieces, crc = HEADER.unpack(whole[: HEADER.size].tobytes())
        state = file.idx.stat()
        if magic != MAGIC or key != [seq_len, first, end] or size != state.st_size:
            return None
        if time != state.st_mtime_ns and digest != sha256_of(file.idx):
            return None
        starts_at = HEADER.size + 8 * samples
        lengths_at = starts_at + 8 * pieces
        if len(whole) != lengths_at + 4 * pieces or crc != _crc(whole[HEADER.size :]):
            return None
        return cls(
            whole[HEADER.size : starts_at].view("<i8"),
            whole[starts_at:lengths_at].view("<i8"),
            whole[lengths_at:].view("<i4"),
        )


def index_file(file: TokenFile, first: int, end: int, seq_len: int, cache: Path | None = None) -> Path:
    """Beside the corpus, or in the folder ``cache`` under a name that holds a digest of the corpus' path."""
    part = "" if (first, end) == (0, file.documents) else f".{first}-{end}"
    ending = f".best-fit-{seq_len}{part}.pack"
    if cache is None:
        return Path(file.prefix + ending)
    place = hashlib.sha256(str(Path(file.prefix).resolve()).encode()).hexdigest()[:16]
    return cache / f"{Path(file.prefix).name}.{place}{ending}"


def sha256_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def best_fit(sizes: Int64s, capacity: int) -> Int64s:
    """The bin of each item: best-fit decreasing, bins numbered from 0. Sizes are 1 to ``capacity``.

    Items of one size go together: all that fit into the bins with the least sufficient room, then into the
    next.
    """
    bins = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    rooms: list[int] = []
    having: dict[int, list[Int64s]] = {}
    opened = done = 0

    def keep(room: int, numbers: Int64s) -> None:
        if room and len(numbers):
            if room not in having:
                bisect.insort(rooms, room)
                having[room] = []
            having[room].append(numbers)

    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            place = bisect.bisect_left(rooms, size)
            room = rooms.pop(place) if place < len(rooms) else capacity
            fitting = room // size
            needed = -(-left // fitting)
            if room in having:
                open_bins = np.concatenate(having.pop(room))
            else:
                open_bins = np.arange(opened, opened + needed)
                opened += needed
            used, rest = open_bins[:needed], open_bins[needed:]
            placed = min(left, len(used) * fitting)
            bins[order[done : done + placed]] = np.repeat(used, fitting)[:placed]
            in_last = placed - (len(used) - 1) * fitting
            keep(room, rest)
            keep(room - fitting * size, used[:-1])
            keep(room - in_last * size, used[-1:])
            left -= placed
            done += placed
    return bins


def _build(path: Path, file: TokenFile, first: int, end: int, seq_len: int) -> None:
    samples = pieces = 0
    with (
        tempfile.TemporaryFile(dir=path.parent) as starts_spool,
        tempfile.TemporaryFile(dir=path.parent) as lengths_spool,
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as out,
    ):
        try:
            out.write(bytes(HEADER.size))
            for group in range(first, end, GROUP):
                documents = np.arange(group, min(group + GROUP, end) + 1)
                ends, starts, lengths = _pack_group(file.document_starts(documents), seq_len)
                out.write((ends + pieces).astype("<i8").tobytes())
                starts_spool.write(starts.astype("<i8").tobytes())
                lengths_spool.write(lengths.astype("<i4").tobytes())
                samples += len(ends)
                pieces += len(starts)
            for spool in (starts_spool, lengths_spool):
                _append(out, spool)
            out.flush()
            state = file.idx.stat()
            payload = np.memmap(out.name, np.uint8, "r")[HEADER.size :] if samples else np.zeros(0, np.uint8)
            key = (seq_len, first, end, state.st_size, state.st_mtime_ns, sha256_of(file.idx))
            out.seek(0)
            out.write(HEADER.pack(MAGIC, *key, samples, pieces, _crc(payload)))
            out.flush()
            os.fsync(out.fileno())
            os.chmod(out.name, 0o644)
            os.replace(out.name, path)
        except BaseException:
            os.unlink(out.name)
            raise
    sync_folder(path.parent)


def _pack_group(documents: Int64s, seq_len: int) -> tuple[Int64s, Int64s, Int64s]:
    """(ends, starts, lengths) as in ``PackIndex``, for documents that begin and end at these positions."""
    pairs = np.maximum(np.diff(documents) - 1, 0)
    full, rest = np.divmod(pairs, seq_len)
    # The k-th full piece of a document begins k * seq_len after it.
    nth = np.arange(int(full.sum())) - np.repeat(np.cumsum(full) - full, full)
    full_starts = np.repeat(documents[:-1], full) + nth * seq_len
    has_rest = rest > 0
    rest_starts = (documents[:-1] + full * seq_len)[has_rest]
    bins = best_fit(rest[has_rest], seq_len) + len(full_starts)
    bins = np.concatenate([np.arange(len(full_starts)), bins])
    starts = np.concatenate([full_starts, rest_starts])
    lengths = np.concatenate([np.full(len(full_starts), seq_len, np.int64), rest[has_rest]])
    order = np.lexsort((starts, bins))
    return np.cumsum(np.bincount(bins)), starts[order], lengths[order]


def _append(out: IO[bytes], spool: IO[bytes]) -> None:
    spool.seek(0)
    while data := spool.read(8 * CHUNK):
        out.write(data)


def _crc(data: npt.NDArray[np.uint8]) -> int:
    crc = 0
    for start in range(0, len(data), 8 * CHUNK):
        crc = zlib.crc32(data[start : start + 8 * CHUNK].data, crc)
    return crc
