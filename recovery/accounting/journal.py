"""A journal as JSON lines: exact on the way out, tolerant on the way in.

``{"v": 1, "entry": "step", "time": 1700000000.5, "attempt": 0, "step": 12, ...}``. Fields that have their
default value are left out. Not-a-number and the infinities, which a loss may be, are the strings ``"nan"``,
``"inf"``, ``"-inf"``, as in the trainer's events.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from recovery.accounting.entries import Entry, Outcome
from recovery.blame import Blame

VERSION = 1
LATEST = 9_000_000_000.0
"""Times beyond the year 2255 are mistakes, and no more fit 64 bits of nanoseconds."""
LARGEST = 2**53
"""Whole numbers beyond it are not exact in other readers of JSON."""
MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Journal:
    """What could be read, in the order in which it was written."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...] = ()
    """One line for each line that was passed over, up to a hundred."""
    passed_over: int = 0
    """Lines that are not entries, those of kinds unknown here among them."""
    torn: bool = False
    """The last line is not whole: its writer was interrupted, or is writing it now."""


def to_json(entry: Entry) -> dict[str, object]:
    """The entry as a JSON object; ``from_json`` gives an equal entry back."""
    line: dict[str, object] = {"v": VERSION, "entry": _name(type(entry))}
    for field in fields(entry):
        value = getattr(entry, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        line[field.name] = _plain(value)
    return line


def from_json(line: Mapping[str, object]) -> Entry | None:
    """The entry that a JSON object stands for; None for a kind that this version does not know.

    Raises ValueError, naming the field, for an object that is no entry. Unknown fields are passed over.
    """
    name = line.get("entry")
    if not isinstance(name, str):
        raise ValueError("entry: a kind of entry is expected")
    if (kind := _KINDS.get(name)) is None:
        return None
    values = {}
    for field, convert in _FIELDS[name].items():
        if field in line:
            try:
                values[field] = convert(line[field])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{field}: {error}") from None
        elif field in _NEEDED[name]:
            raise ValueError(f"{field}: is missing")
    return kind(**values)


def read(lines: Iterable[str | bytes]) -> Journal:
    """Read JSON lines. A line that is no entry is passed over and told in `problems`; nothing raises."""
    entries: list[Entry] = []
    problems: list[str] = []
    passed_over = 0
    torn = False
    for number, raw in enumerate(lines, start=1):
        torn = False
        text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("a JSON object is expected")
            entry = from_json(value)
            if entry is None:
                raise ValueError(f"entry: {str(value['entry'])[:40]!r} is not a kind known here")
        except (ValueError, RecursionError) as error:
            passed_over += 1
            # A prefix of an object is never an object: only an unfinished line can be both.
            torn = not text.endswith("\n") and isinstance(error, json.JSONDecodeError)
            if len(problems) < MAX_PROBLEMS:
                problems.append(f"line {number}: {str(error)[:200]}")
            continue
        entries.append(entry)
    return Journal(tuple(entries), tuple(problems), passed_over, torn)


def _name(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return list(value) if isinstance(value, tuple) else value


def _number(value: object, low: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= LATEST:
        raise ValueError(f"seconds from {low:g} to {LATEST:g} are expected, found {str(value)[:40]!r}")
    return float(value)


def _any_number(value: object) -> float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a number is expected, found {str(value)[:40]!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise ValueError(f"a whole number from 0 is expected, found {str(value)[:40]!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text is expected, found {str(value)[:40]!r}")
    return value


def _each(convert: Callable[[object], Any]) -> Callable[[object], Any]:
    def tuple_of(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"a list is expected, found {str(value)[:40]!r}")
        return tuple(convert(one) for one in value)

    return tuple_of


def _or_none(convert: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else convert(value)


def _member(choices: type[Blame] | type[Outcome]) -> Callable[[object], Any]:
    return lambda value: choices(_text(value))


_CONVERT: dict[object, Callable[[object], Any]] = {
    float: _number,
    float | None: _or_none(_number),
    int: _count,
    int | None: _or_none(_count),
    str: _text,
    tuple[str, ...]: _each(_text),
    tuple[int, ...]: _each(_count),
    Blame: _member(Blame),
    Outcome: _member(Outcome),
}
_KINDS: dict[str, Callable[..., Entry]] = {_name(kind): kind for kind in typing.get_args(Entry)}
_FIELDS = {
    _name(kind): {
        # Alone among the numbers a loss may be anything: that is what it is watched for.
        field: _or_none(_any_number) if field == "loss" else _CONVERT[hint]
        for field, hint in typing.get_type_hints(kind).items()
    }
    for kind in typing.get_args(Entry)
}
_NEEDED = {
    _name(kind): {field.name for field in fields(kind) if field.default is MISSING}
    for kind in typing.get_args(Entry)
}
