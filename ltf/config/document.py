"""Plain YAML with the line of every value: no tags, no objects, no duplicate keys, bounded size.

Plain words are read by the core schema of YAML 1.2, so ``3e-4`` is a number and ``no`` is text; PyYAML alone
would follow YAML 1.1, where it is the other way round. Underscores may group the digits of a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ltf.config.errors import ConfigError, Mistake

Place = tuple[str | int, ...]
"""Keys and list indices from the root: ``("data", "sources", 0, "weight")``."""

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000
"""Values in one document, aliases followed: a few lines of nested aliases stand for billions."""
MAX_DEPTH = 50

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS = {f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """`data`: dict, list, str, int, float, bool, None. `lines`: the line (from 1) of every place."""

    file: str
    data: Any
    lines: Mapping[Place, int]


def load(path: Path) -> Document:
    """Read a file; ConfigError if it cannot be read or is not plain YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(str(path), None, reason, "a YAML file", "correct the path") from None
    if len(content) > MAX_BYTES:
        raise _error(
            str(path), None, "a larger file", f"at most {MAX_BYTES:,} bytes", "is it a configuration?"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {content[error.start]:#04x} at {error.start}"
        raise _error(str(path), None, found, "UTF-8 text", "save the file as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Read one document from text; `name` stands for the file in errors."""
    lines: dict[Place, int] = {}
    try:
        data = _Builder(name, text, lines).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"a slip of syntax ({' '.join(part for part in (error.context, error.problem) if part)})"
        fix = "see to indentation, quotes and brackets there"
        raise _error(name, mark.line + 1 if mark else None, what, "valid YAML", fix) from None
    except yaml.YAMLError as error:
        what = f"what no YAML has ({' '.join(str(error).split())})"
        raise _error(name, None, what, "valid YAML", "remove what an editor does not show") from None
    return Document(name, data, lines)


class _Builder:
    """Builds from the parser's events, so that nothing is made of a document before its bounds are known."""

    def __init__(self, name: str, text: str, lines: dict[Place, int]) -> None:
        self._name = name
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._lines = lines
        self._values = 0
        self._anchors: dict[str, tuple[Any, int]] = {}

    def document(self) -> Any:
        data = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document", "one document", "remove the line ---")
                data = self._value(next(self._events), ())
        return data

    def _value(self, event: Any, place: Place) -> Any:
        before = self._values
        self._count(event, 1)
        self._lines.setdefault(place, _line(event))
        if len(place) > MAX_DEPTH:
            raise self._error(event, "deeper nesting", f"at most {MAX_DEPTH} levels", "flatten it")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        tag = self._tag(event)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, tag)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                value.append(self._value(inner, (*place, len(value))))
        else:
            value = self._mapping(place)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._values - before
        return value

    def _mapping(self, place: Place) -> dict[str, Any]:
        built: dict[str, Any] = {}
        while True:
            key: Any = next(self._events)
            if isinstance(key, yaml.MappingEndEvent):
                return built
            if not isinstance(key, yaml.ScalarEvent):
                raise self._error(
                    key, "a key that is no plain word", "text", "put it in quotes if it has brackets"
                )
            if key.value == "<<" and not key.style:
                fix = "write the keys out, or use `preset: FILE`"
                raise self._error(key, "the merge key '<<'", "keys of the configuration", fix)
            inner = (*place, key.value)
            if key.value in built:
                first = self._lines[inner]
                raise self._error(
                    key, f"the key {key.value!r} twice", f"only that on line {first}", "keep one"
                )
            self._lines[inner] = _line(key)
            built[key.value] = self._value(next(self._events), inner)

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            found, expected = f"the alias *{event.anchor}", f"a finished &{event.anchor} above it"
            raise self._error(event, found, expected, "an alias cannot contain itself")
        value, size = self._anchors[event.anchor]
        self._count(event, size)
        return _copy(value)

    def _tag(self, event: Any) -> str | None:
        if event.tag is None or event.tag == "!":
            return "str" if event.tag else None
        if event.tag not in _TAGS:
            raise self._error(event, f"the tag {event.tag}", "plain values", "remove the tag")
        return _TAGS[event.tag]

    def _scalar(self, event: Any, tag: str | None) -> Any:
        text: str = event.value
        value = text if event.style or tag == "str" else plain(text)
        if tag not in (None, "str") and not event.style and type(value).__name__ != tag and value is not None:
            raise self._error(event, repr(text), f"a value of the tag !!{tag}", "remove the tag")
        return value

    def _count(self, event: Any, more: int) -> None:
        self._values += more
        if self._values > MAX_VALUES:
            found, expected = "more values, aliases followed", f"at most {MAX_VALUES:,}"
            raise self._error(event, found, expected, "is it a configuration?")

    def _error(self, event: Any, found: str, expected: str, fix: str) -> ConfigError:
        return _error(self._name, _line(event), found, expected, fix)


def plain(text: str) -> Any:
    """What an unquoted word means."""
    if text in _NULLS:
        return None
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        # int() itself refuses thousands of digits; nothing here needs more than a hundred.
        return int(text.replace("_", "")) if len(text) <= 100 else text
    if _NUMBER.fullmatch(text):
        return float(text.replace("_", ""))
    if found := _NO_NUMBER.fullmatch(text):
        return float(found[1] + found[2].lower())
    return text


def field_name(place: Place) -> str:
    """``data.sources.0.weight``, as ``--set`` takes it."""
    return ".".join(map(str, place))


def _line(event: Any) -> int:
    """Where it begins, from 1."""
    return int(event.start_mark.line) + 1


def _copy(value: Any) -> Any:
    match value:
        case dict():
            return {key: _copy(inner) for key, inner in value.items()}
        case list():
            return [_copy(inner) for inner in value]
        case _:
            return value


def _error(name: str, line: int | None, found: str, expected: str, fix: str) -> ConfigError:
    return ConfigError([Mistake(name if line is None else f"{name}:{line}", "", found, expected, fix)])
