"""Documents from text and JSON-lines files, plain or compressed, one at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

from ltf.data.errors import DataError

TEXT, JSON_LINES = (".txt", ".text", ".md"), (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
BLOCK = 1 << 20


class Documents(Enum):
    """What a document is in a text file. In JSON lines it is a line."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


@dataclass(frozen=True)
class Raw:
    """A document as bytes, and the line (from 1) with which it begins."""

    file: str
    line: int
    data: bytes


@dataclass(frozen=True)
class Broken:
    """A line that gives no document, and why."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.why}"


class Input:
    """An input file, streamed: memory holds one document and a megabyte. ``read`` counts its bytes on the
    disk."""

    def __init__(self, path: Path, documents: Documents, longest: int) -> None:
        self.path, self._documents, self._longest = path, documents, longest
        self.json_lines = _kind(path) in JSON_LINES
        self.bytes = path.stat().st_size
        self.read = 0

    def __iter__(self) -> Iterator[Raw | Broken]:
        with self.path.open("rb") as file:
            lines = _Lines(self._unpacked(file), self.path, self._longest)
            if self.json_lines or self._documents is Documents.LINE:
                yield from (raw for raw in lines if isinstance(raw, Broken) or raw.data.strip())
            else:
                yield from self._gathered(lines)
        self.read = self.bytes

    def _gathered(self, lines: Iterable[Raw | Broken]) -> Iterator[Raw | Broken]:
        """Lines put together to documents. A broken line is told of, and left out of its document."""
        held: list[bytes] = []
        first, size = 1, 0
        for line in lines:
            if isinstance(line, Broken):
                yield line
                continue
            ends = self._documents is Documents.PARAGRAPH and not line.data.strip()
            if not ends:
                first = first if held else line.line
                held.append(line.data)
                size += len(line.data)
                if size > self._longest:
                    raise DataError(
                        f"the document that begins at line {first} is longer than {self._longest} bytes: "
                        "split it (--documents paragraph or line) or raise --longest",
                        self.path,
                    )
            elif held:
                yield Raw(str(self.path), first, b"".join(held))
                held, size = [], 0
        if b"".join(held).strip():
            yield Raw(str(self.path), first, b"".join(held))

    def _unpacked(self, file: IO[bytes]) -> Iterator[bytes]:
        def blocks() -> Iterator[bytes]:
            while block := file.read(BLOCK):
                self.read += len(block)
                yield block

        match self.path.suffix:
            case ".gz":
                yield from _gunzip(file, self)
            case ".zst":
                yield from _unzstd(blocks(), self.path)
            case _:
                yield from blocks()


def find(paths: Sequence[str | Path], documents: Documents, longest: int) -> list[Input]:
    """The named files, and in folders every file of a known kind, by name."""
    found: list[Input] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
            if not inside:
                raise DataError(f"no {_known()} file in this folder", path)
            found += (Input(file, documents, longest) for file in inside)
        elif not path.is_file():
            raise DataError("no such file or folder", path)
        elif not _kind(path):
            raise DataError(f"unknown kind of file; expected {_known()}, as it is or with .gz or .zst", path)
        else:
            found.append(Input(path, documents, longest))
    if not found:
        raise DataError("no input files")
    return found


def text_of(raw: Raw, field: str) -> str | Broken:
    """The document's text; of a JSON line, that of its ``field``."""
    try:
        text = raw.data.decode()
    except UnicodeDecodeError as error:
        line = raw.line + raw.data[: error.start].count(b"\n")
        return Broken(raw.file, line, f"not UTF-8: byte {raw.data[error.start]:#04x}")
    if raw.line == 1:
        text = text.removeprefix("\ufeff")
    if _kind(Path(raw.file)) not in JSON_LINES:
        return text
    try:
        value: Any = json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        return Broken(raw.file, raw.line, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Broken(raw.file, raw.line, f"expected a JSON object, found {type(value).__name__}")
    if field not in value:
        return Broken(
            raw.file, raw.line, f"no field {field!r}; it has {', '.join(map(repr, value)) or 'none'}"
        )
    if not isinstance(value[field], str):
        return Broken(raw.file, raw.line, f"field {field!r} is {type(value[field]).__name__}, expected text")
    try:
        value[field].encode()
    except UnicodeEncodeError:
        return Broken(raw.file, raw.line, f"field {field!r} holds half a surrogate pair, which is no text")
    return str(value[field])


class _Lines:
    """Lines with their ends, from blocks of bytes; a line longer than ``longest`` is broken, and not held."""

    def __init__(self, blocks: Iterator[bytes], path: Path, longest: int) -> None:
        self._blocks, self._path, self._longest = blocks, str(path), longest

    def __iter__(self) -> Iterator[Raw | Broken]:
        number, size = 1, 0
        held: list[bytes] = []
        for block in self._blocks:
            for part in io.BytesIO(block):
                size += len(part)
                if size <= self._longest:
                    held.append(part)
                if part.endswith(b"\n"):
                    yield self._line(number, held, size)
                    number, held, size = number + 1, [], 0
        if size:
            yield self._line(number, held, size)

    def _line(self, number: int, held: list[bytes], size: int) -> Raw | Broken:
        if size > self._longest:
            return Broken(self._path, number, f"{size} bytes, longer than {self._longest}: raise --longest")
        return Raw(self._path, number, b"".join(held))


def _gunzip(file: IO[bytes], source: Input) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while True:
            try:
                block = unpacked.read(BLOCK)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(
                    f"damaged or truncated gzip file ({error})", source.path, file.tell()
                ) from error
            source.read = file.tell()
            if not block:
                return
            yield block


def _unzstd(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Frame by frame: the package's own stream reader takes a truncated file for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError("a .zst file needs the package `zstandard`: pip install zstandard", path) from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside, at = False, 0
    for block in blocks:
        data = block
        while data:
            try:
                unpacked = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DataError(f"damaged zstd file ({error})", path, at) from error
            if unpacked:
                yield unpacked
            inside = not frame.eof
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
        at += len(block)
    if inside:
        raise DataError("truncated zstd file", path, at)


def _kind(path: Path) -> str:
    """The ending that tells the kind of file, or nothing."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    return plain.suffix if plain.suffix in TEXT + JSON_LINES else ""


def _known() -> str:
    return ", ".join(TEXT + JSON_LINES)
