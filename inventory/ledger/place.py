"""Where a ledger is: an SQLite file or a PostgreSQL database. Its password is never shown."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from inventory.ledger.errors import LedgerError

_EXPECTED = "expected a file's path, sqlite:///PATH or postgresql://[USER[:PASSWORD]@]HOST/DATABASE"


@dataclass(frozen=True)
class Place:
    """A file (`path`) or a database (`url`); ``str(place)`` is safe to print and to log."""

    shown: str
    path: Path | None = None
    url: URL | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.shown

    def scrub(self, text: str) -> str:
        """`text` without the secrets that this place's URL holds."""
        if self.url is None:
            return text
        for secret in _secrets(self.url):
            text = text.replace(secret, "***")
        return text


def find_place(url: str | Path) -> Place:
    """Understand what a person wrote; LedgerError, without repeating a password, if it makes no sense."""
    if isinstance(url, Path):
        return _file(url)
    if not url.strip():
        raise LedgerError(f"the ledger's place is empty; {_EXPECTED}")
    if "://" not in url:
        return _file(Path(url))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text may hold a password, and so may the exception.
        raise LedgerError(f"the ledger's URL cannot be understood; {_EXPECTED}") from None
    match parsed.drivername:
        case "sqlite" | "sqlite+pysqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise LedgerError("the ledger's URL names no file; expected sqlite:///PATH")
            return _file(Path(parsed.database))
        case "postgresql" | "postgres" | "postgresql+psycopg":
            parsed = parsed.set(drivername="postgresql+psycopg")
            return Place(_masked(parsed), url=parsed)
        case other:
            raise LedgerError(f"a ledger cannot be kept in '{other}'; {_EXPECTED}")


def _file(path: Path) -> Place:
    full = Path(os.path.abspath(path.expanduser()))
    return Place(str(full), path=full)


def _is_secret(key: str) -> bool:
    return "password" in key.lower() or key.lower() == "passphrase"


def _masked(url: URL) -> str:
    query = {key: "***" if _is_secret(key) else value for key, value in url.query.items()}
    return url.set(drivername="postgresql", query=query).render_as_string(hide_password=True)


def _secrets(url: URL) -> list[str]:
    found = [] if url.password is None else [str(url.password)]
    for key, value in url.query.items():
        if _is_secret(key):
            found += [value] if isinstance(value, str) else list(value)
    return [secret for secret in found if secret]
