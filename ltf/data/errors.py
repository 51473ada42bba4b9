"""What is wrong with training data or with the request for it, in one line."""

from __future__ import annotations

from pathlib import Path


class DataError(Exception):
    """A person's or a disk's fault: one clear line, no traceback, exit status 2.

    ``file`` and ``offset`` (bytes from its start) name the place where one is known.
    """

    def __init__(self, message: str, file: str | Path | None = None, offset: int | None = None) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.offset = offset
        place = "" if file is None else f"{file}: " if offset is None else f"{file}: byte {offset}: "
        super().__init__(place + message)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str | None, int | None]]:
        """A process that read the data may send it to the one that asked."""
        return DataError, (self.message, self.file, self.offset)
