"""YAML that people write, read so that every mistake is answered with file, line and field.

All of the project's YAML goes through :func:`read` (data and the lines it stood on) or
:func:`load` (the same, checked against a pydantic model).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from inventory.errors import DocumentError

Key = str | int
Place = tuple[Key, ...]
M = TypeVar("M", bound=BaseModel)

MAX_VALUES = 1_000_000
"""Values in one document, aliases followed: a few lines of nested aliases stand for billions."""
MAX_DEPTH = 200
"""Mappings and lists inside each other: libyaml's recursion overruns the stack at some tens of thousands."""


@dataclass(frozen=True)
class Document:
    """Plain data (dict, list, scalars) and, for every place in it, the line where it was written."""

    file: str
    data: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int | None:
        """The line of `place`, or of the nearest enclosing place that has one (1-based)."""
        for length in range(len(place), -1, -1):
            if (found := self.lines.get(place[:length])) is not None:
                return found
        return None

    def error(self, place: Place, message: str) -> DocumentError:
        """The error to raise for something wrong at `place`."""
        return DocumentError(self.file, self.line(place), field_name(place), message)

    def parse(self, model: type[M]) -> M:
        """Check the data against `model`; the first mistake is raised as a DocumentError."""
        if self.data is None or not isinstance(self.data, dict):
            raise self.error((), f"expected a mapping of keys to values, found {kind(self.data)}")
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            raise self._first_mistake(error, model) from None

    def _first_mistake(self, error: ValidationError, model: type[BaseModel]) -> DocumentError:
        # A misspelt key makes two mistakes, and the missing one is the less telling: those come last.
        def order(one: ErrorDetails) -> tuple[bool, int]:
            return one["type"] == "missing", self.line(_known(one["loc"], self.lines)) or 0

        first = min(error.errors(), key=order)
        # pydantic adds the names of union members and of "[key]" to the path; keep what the file has.
        place = _known(first["loc"], self.lines)
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])
            known = _fields_at(model, tuple(first["loc"][:-1]))
            near = difflib.get_close_matches(unknown, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
            return self.error(
                place if place[-1:] == (unknown,) else (*place, unknown), f"unknown key; {advice}"
            )
        if first["type"] == "missing":
            return self.error((*place, str(first["loc"][-1])), "this key is required and is missing")
        message = first["msg"].removeprefix("Value error, ")
        if message.startswith("Input should be"):
            message = next((say for what, say in _WANTED.items() if first["type"].startswith(what)), message)
            message = message.replace("Input should be", "must be") + f"; found {kind(first['input'])}"
        return self.error(place, message[:1].lower() + message[1:])


def read(path: Path | str, text: str | None = None, loader: type[Any] | None = None) -> Document:
    """Read one YAML document; `text` replaces the file's content (its name still appears in errors).

    `loader` is a PyYAML loader class for files whose dialect is not ours (other tags, other scalars).
    Raises DocumentError for a file that cannot be read and for everything that is not plain YAML.
    """
    name = str(path)
    if text is None:
        text = read_text(path)
    opened = None
    try:
        if _too_deep(text):
            raise DocumentError(name, None, "", f"is nested more than {MAX_DEPTH} levels deep")
        opened = (loader or _Loader)(text)
        root = opened.get_single_node()
        builder = _Builder(name, opened)
        data = None if root is None else builder.build(root, (), frozenset())
    except yaml.constructor.ConstructorError as error:
        raise DocumentError(name, _line_of(error), "", error.problem or str(error)) from None
    except yaml.MarkedYAMLError as error:
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(name, _line_of(error), "", f"not valid YAML: {_in_plain_words(what)}") from None
    except yaml.reader.ReaderError as error:
        # libyaml gives the position in bytes and the character as a number.
        line = text.encode(errors="replace")[: error.position].count(b"\n") + 1
        message = f"not valid YAML: the character U+{int(error.character):04X} is not allowed"
        raise DocumentError(name, line, "", message) from None
    except yaml.YAMLError as error:
        raise DocumentError(name, None, "", f"not valid YAML: {error}") from None
    finally:
        if opened is not None:
            opened.dispose()
    return Document(name, data, builder.lines)


def read_text(path: Path | str) -> str:
    """A text file that a person named; DocumentError when it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DocumentError(str(path), None, "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(str(path), None, "", f"is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise DocumentError(str(path), None, "", f"cannot be read: {error}") from None


def load(path: Path | str, model: type[M], text: str | None = None) -> M:
    """Read a YAML file and check it against a pydantic model."""
    return read(path, text).parse(model)


def field_name(place: Place) -> str:
    """``("nodes", "n1", "labels", 0)`` as a person reads it: ``nodes.n1.labels[0]``."""
    name = ""
    for key in place:
        name += f"[{key}]" if isinstance(key, int) else (f".{key}" if name else str(key))
    return name


def kind(value: object) -> str:
    """What YAML calls this value, for messages."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool():
            return f"the truth value {str(value).lower()}"
        case str():
            return f"the text {value!r}"
        case _:
            return f"{value!r}"


class _Loader(yaml.CSafeLoader):
    """The safe loader, less the numbers that people never mean: ``012`` is ten, ``1:30`` is ninety."""

    def whole_number(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        if ":" in text or re.fullmatch(r"[-+]?0[0-9]+", text):
            meaning = self.construct_yaml_int(node)
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"YAML reads {node.value} as the number {meaning}; put it in quotes or write it in decimal",
                node.start_mark,
            )
        return int(self.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)


class _Builder:
    """Builds plain data from YAML's nodes and notes the line of every place."""

    def __init__(self, file: str, loader: Any) -> None:
        self.file, self.loader = file, loader
        self.lines: dict[Place, int] = {}
        self._checked: dict[int, yaml.Node] = {}
        self._values = 0

    def build(self, node: yaml.Node, place: Place, above: frozenset[int]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)
        self._values += 1
        if self._values > MAX_VALUES:
            raise DocumentError(
                self.file, line, "", f"holds more than {MAX_VALUES:,} values, aliases followed"
            )
        if isinstance(node, yaml.ScalarNode):
            return self.loader.construct_object(node)
        if id(node) in above:
            raise DocumentError(self.file, line, field_name(place), "an alias contains itself")
        above = above | {id(node)}
        # A loader may turn a whole collection into one value by its tag; plain ones have the default tags.
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            return self.loader.construct_object(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*place, i), above) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        self._check_keys(node, place)
        built: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            inner = (*place, key_node.value)
            self.lines[inner] = key_node.start_mark.line + 1
            built[key_node.value] = self.build(value_node, inner, above)
        return built

    def _check_keys(self, node: yaml.MappingNode, place: Place) -> None:
        """Refuse keys that are given twice, then pull in what ``<<`` names; once, as it changes the node."""
        if id(node) in self._checked:
            return
        self._checked[id(node)] = node
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._wrong(
                    key_node, place, "a key must be plain text; put it in quotes if it has brackets"
                )
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._check_merge(node, value_node, place)
            elif first := seen.get(key_node.value):
                where = (*place, key_node.value)
                raise self._wrong(key_node, where, f"this key is already given on line {first}; keep one")
            seen[key_node.value] = key_node.start_mark.line + 1
        self.loader.flatten_mapping(node)

    def _check_merge(self, node: yaml.MappingNode, merged: yaml.Node, place: Place) -> None:
        """Refuse what a mapping may not take in: PyYAML recurses for ever into one that merges itself."""
        parts = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self._wrong(part, place, "'<<' takes a mapping, e.g. <<: *defaults")
            if part is node:
                raise self._wrong(part, place, "an alias contains itself")
            self._check_keys(part, place)

    def _wrong(self, node: yaml.Node, place: Place, message: str) -> DocumentError:
        return DocumentError(self.file, node.start_mark.line + 1, field_name(place), message)


_WANTED = {
    "string_": "must be text",
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "dict_": "must be a mapping of keys to values",
    "model_": "must be a mapping of keys to values",
    "list_": "must be a list",
    "tuple_": "must be a list",
}
"""What pydantic's kinds of error want, in the words of who writes YAML."""

_PLAIN_WORDS = {
    r"found character that cannot start": "a tab, '@', '`' or '%' stands where none may be; "
    "indent with spaces, put such text in quotes",
    r"mapping values are not allowed": "a ':' stands where none may be; indent like the lines around it, "
    "or put the value in quotes",
    r"could not find expected ':'": "a ':' after the key is missing",
    r"expected a single document": "a second document begins here; one file holds one",
    r"did not find expected ',' or '\]'": "a list in brackets is not closed, or its ',' is missing",
    r"did not find expected ',' or '\}'": "a mapping in braces is not closed, or its ',' is missing",
    r"did not find expected key": "the indentation does not fit the lines above, "
    "or a quote or bracket is not closed",
    r"undefined alias": "the alias (*name) has no anchor (&name) above it",
    r"found undefined tag|could not determine a constructor": "tags (!name) are not understood here",
}


def _too_deep(text: str) -> bool:
    """Deeper than MAX_DEPTH. Counting brackets is cheap; quoted ones mislead it, and then YAML is asked."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest <= MAX_DEPTH and not re.search(rf"^[-? ]{{{MAX_DEPTH},}}", text, re.MULTILINE):
        return False
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return True
    return False


def _in_plain_words(problem: str) -> str:
    return next((words for found, words in _PLAIN_WORDS.items() if re.search(found, problem)), problem)


def _line_of(error: yaml.MarkedYAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else None


def _known(loc: tuple[Key, ...], lines: Mapping[Place, int]) -> Place:
    """The part of pydantic's error path that names places in the file."""
    place: Place = ()
    for key in loc:
        if (*place, key) in lines:
            place = (*place, key)
    return place


def _fields_at(model: type[BaseModel], loc: tuple[Key, ...]) -> list[str]:
    """Names that are allowed at `loc`: follows the annotations as far as they lead to models."""
    current: list[type[BaseModel]] = [model]
    for key in loc:
        following: list[type[BaseModel]] = []
        for candidate in current:
            field = candidate.model_fields.get(str(key))
            by_alias = [f for f in candidate.model_fields.values() if f.alias == key]
            for one in [field] if field else by_alias:
                following += _models_in(one.annotation)
        current = following or current
    return [field.alias or name for m in current for name, field in m.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for part in getattr(annotation, "__args__", ()):
        found += _models_in(part)
    return found
