"""The one exception that stands for a person's mistake."""


class UsageError(Exception):
    """Bad input from a person: one clear line, no traceback, exit status 2.

    The message says what was wrong, what was expected and what to do.
    """


class DocumentError(UsageError):
    """A file that a person wrote is wrong at a known place: ``file:line: field: message``."""

    def __init__(self, file: str, line: int | None, field: str, message: str) -> None:
        self.file, self.line, self.field, self.message = file, line, field, message
        place = f"{file}:{line}" if line else file
        super().__init__(f"{place}: {field}: {message}" if field else f"{place}: {message}")
