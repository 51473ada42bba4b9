"""YAML that people write, read so that every mistake is answered with file, line and field.

All of the project's YAML goes through :func:`read` (data and the lines it stood on) or
:func:`load` (the same, checked against a pydantic model).
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from inventory.errors import DocumentError

Key = str | int
Place = tuple[Key, ...]
M = TypeVar("M", bound=BaseModel)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
        first = min(error.errors(), key=lambda e: self.line(_known(e["loc"], self.lines)) or 0)
        # pydantic adds the names of union members and of "[key]" to the path; keep what the file has.
        place = _known(first["loc"], self.lines)
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])
            known = _fields_at(model, tuple(first["loc"][:-1]))
            near = difflib.get_close_matches(unknown, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
            return self.error((*place[:-1], unknown), f"unknown key; {advice}")
        if first["type"] == "missing":
            return self.error((*place, str(first["loc"][-1])), "this key is required and is missing")
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        shown = first["input"]
        if isinstance(shown, str | int | float | bool) or shown is None:
            message += f", found {shown!r}"
        return self.error(place, message)


def read(path: Path | str, text: str | None = None) -> Document:
    """Read one YAML document; `text` replaces the file's content (its name still appears in errors)."""
    name = str(path)
    if text is None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DocumentError(name, None, "", f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DocumentError(name, None, "", f"is not UTF-8 text (byte {error.start})") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[Place, int] = {}
        data = None if root is None else _build(loader, root, (), lines, name, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(name, mark.line + 1 if mark else None, "", f"not valid YAML: {what}") from None
    except yaml.YAMLError as error:
        raise DocumentError(name, None, "", f"not valid YAML: {error}") from None
    finally:
        loader.dispose()
    return Document(name, data, lines)


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


def _build(
    loader: Any, node: yaml.Node, place: Place, lines: dict[Place, int], file: str, above: set[int]
) -> Any:
    if id(node) in above:
        raise DocumentError(file, node.start_mark.line + 1, field_name(place), "an alias contains itself")
    lines.setdefault(place, node.start_mark.line + 1)
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise DocumentError(file, key_node.start_mark.line + 1, field_name(place), "a key must be plain text")
            line = key_node.start_mark.line + 1
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                first = seen[key_node.value]
                where = field_name((*place, key_node.value))
                raise DocumentError(file, line, where, f"this key is already given on line {first}; keep one")
            seen[key_node.value] = line
        loader.flatten_mapping(node)
        built: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            inner = (*place, key)
            lines[inner] = key_node.start_mark.line + 1
            built[key] = _build(loader, value_node, inner, lines, file, above)
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*place, i), lines, file, above) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


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
            for one in ([field] if field else by_alias):
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
