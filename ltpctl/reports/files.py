"""Reports as files: whole or not at all, and refused before the work rather than after it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inventory.errors import UsageError


def refuse_unwritable(option: str, file: str | None) -> None:
    """UsageError, naming `option`, for a file that could not be written when the work is done."""
    if file is None:
        return
    folder = Path(file).absolute().parent
    if Path(file).is_dir():
        raise UsageError(f"{option} {file}: this is a folder; name a file")
    if not folder.is_dir():
        raise UsageError(f"{option} {file}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {file}: the folder {folder} is not writable")


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the place of `path`: nobody sees half of it, and a failure leaves the old file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    # Exclusively: in a folder that others may write to, such as /tmp, the name may be a link of theirs.
    with beside.open("x", encoding="utf-8", errors="backslashreplace") as file, _unlinked(beside):
        with suppress(FileNotFoundError):
            # Who could not read the old file shall not read the new one.
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        file.write(text)
        file.flush()
        beside.replace(path)


@contextmanager
def _unlinked(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
