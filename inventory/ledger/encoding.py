"""Values to text that both databases take and give back, and run ids."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def to_json(value: object) -> str:
    """JSON text. Tuples and sets become lists, dataclasses mappings, NaN and the infinities their names."""
    return json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Any:
    return json.loads(text)


def to_text(value: str) -> str:
    """`value` without what a database refuses: NUL and halves of surrogate pairs are written as escapes."""
    if value.isascii() and "\0" not in value:
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def run_id(started: float) -> str:
    """An id that sorts by time and is safe in file names: ``20260102T030405.678-k3f9q2``."""
    moment = datetime.fromtimestamp(started, UTC)
    tail = "".join(secrets.choice(_ALPHABET) for _ in range(6))
    return f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03d}-{tail}"


def _plain(value: object) -> object:
    match value:
        case enum.Enum():
            return _plain(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(_plain(key)): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=str)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            raise TypeError(f"{type(value).__name__} cannot be kept in the ledger as JSON: {value!r}")
