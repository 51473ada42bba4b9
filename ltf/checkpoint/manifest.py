"""What a committed checkpoint says of itself: files with sizes and digests, progress, configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ltf.findings import Json

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
METADATA = ".metadata"
FORMAT = 1


class Unfit(Exception):
    """A checkpoint that must not be used. `file`: the file at fault, relative to its folder."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(f"{file}: {what}")
        self.file = file
        self.what = what

    def __reduce__(self) -> tuple[type[Unfit], tuple[str, str]]:
        return Unfit, (self.file, self.what)


@dataclass(frozen=True)
class FileRecord:
    """`size` in bytes, `sha256` in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`version`: optimizer steps behind it. `about`: who wrote it (ranks, torch, time), for people only."""

    version: int
    progress: Mapping[str, Json]
    config: Mapping[str, Json]
    about: Mapping[str, Json]
    files: Mapping[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.size for record in self.files.values())

    def to_bytes(self) -> bytes:
        plain = {
            "format": FORMAT,
            "version": self.version,
            "progress": dict(self.progress),
            "config": dict(self.config),
            "about": dict(self.about),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        return (json.dumps(plain, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Unfit if it is not one of ours."""
        try:
            plain = json.loads(data)
            if plain["format"] != FORMAT:
                raise Unfit(MANIFEST, f"format {plain['format']!r}; this version reads {FORMAT}")
            files = {name: FileRecord(int(f["size"]), str(f["sha256"])) for name, f in plain["files"].items()}
            outside = [name for name in files if Path(name).name != name]
            if outside:
                raise Unfit(MANIFEST, f"names a file outside of its folder: {outside[0]!r}")
            if METADATA not in files:
                raise Unfit(MANIFEST, f"does not list {METADATA}")
            return cls(int(plain["version"]), plain["progress"], plain["config"], plain["about"], files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unfit(MANIFEST, f"not a manifest ({error!r})") from error


def marker_for(manifest: bytes) -> bytes:
    """The commit marker's whole content."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


def read(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint whose marker confirms it; Unfit otherwise."""
    marker = _content(folder, MARKER)
    manifest = _content(folder, MANIFEST)
    if marker != marker_for(manifest):
        raise Unfit(MANIFEST, f"its SHA-256 is not the one in {MARKER}")
    return Manifest.from_bytes(manifest)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Unfit if a file is missing or not as long as it was."""
    for name, record in manifest.files.items():
        _check_size(folder, name, record)


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Read the whole file; Unfit unless size and digest are those recorded."""
    _check_size(folder, name, record)
    try:
        with (folder / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Unfit(name, f"cannot be read ({error.strerror})") from error
    if found != record.sha256:
        raise Unfit(name, f"SHA-256 is {found[:12]}..., recorded was {record.sha256[:12]}...")


def _check_size(folder: Path, name: str, record: FileRecord) -> None:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError as error:
        raise Unfit(name, "missing") from error
    except OSError as error:
        raise Unfit(name, f"cannot be read ({error.strerror})") from error
    if size != record.size:
        raise Unfit(name, f"{size} bytes long, recorded were {record.size}")


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise Unfit(name, "missing") from error
    except OSError as error:
        raise Unfit(name, f"cannot be read ({error.strerror})") from error
