"""``PREFIX.json``: what ``prepare`` states about the pair that it wrote, checked before the pair is trained
on.

A pair made elsewhere has none; then only what the pair itself says can be checked.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltf.data.bestfit import sha256_of
from ltf.data.errors import DataError
from ltf.data.megatron import TokenFile
from ltf.data.writer import WrittenFile, sync_folder

SCHEMA = "ltf/corpus/1"


@dataclass(frozen=True)
class Manifest:
    """``tokenizer`` identifies the vocabulary: ``bytes``, or ``sha256:`` and the digest of its
    tokenizer.json."""

    tokenizer: str
    vocabulary: int
    end_of_document: int
    documents: int
    tokens: int
    held_out: float
    side: str
    skipped: int
    bin: WrittenFile
    idx: WrittenFile


def manifest_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def write(manifest: Manifest, prefix: str | Path) -> None:
    file = manifest_file(prefix)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("w") as out:
            json.dump({"schema": SCHEMA} | asdict(manifest), out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(file.parent)


def read(prefix: str | Path) -> Manifest | None:
    """None where there is none."""
    file = manifest_file(prefix)
    if not file.is_file():
        return None
    try:
        fields: dict[str, Any] = json.loads(file.read_bytes())
        if (schema := fields.pop("schema")) != SCHEMA:
            raise DataError(f"schema {schema!r}, expected {SCHEMA!r}", file)
        return Manifest(**fields | {name: WrittenFile(**fields[name]) for name in ("bin", "idx")})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"not a corpus manifest ({error!r}); remove it to go without", file) from error


def check(manifest: Manifest, file: TokenFile, *, whole: bool = False) -> None:
    """Hold a pair to its manifest: sizes and the index' digest; with ``whole`` the digest of the tokens
    too."""
    for path, stated in ((file.bin, manifest.bin), (file.idx, manifest.idx)):
        size = path.stat().st_size
        if size != stated.bytes:
            raise DataError(f"{size} bytes, {manifest_file(file.prefix)} states {stated.bytes}", path)
        if (whole or path == file.idx) and (digest := sha256_of(path).hex()) != stated.sha256:
            raise DataError(
                f"SHA-256 is {digest}, {manifest_file(file.prefix)} states {stated.sha256}: the file changed "
                "after it was written",
                path,
            )
