"""The supervisor's values as JSON and back, exactly: what is stored is what was decided."""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class StoredError(ValueError):
    """Stored data does not have the shape of the value that it should be; the message names the field."""


def to_json(value: object) -> Any:
    """Dataclasses as objects, tuples as lists, enums as their values; floats that JSON lacks as their names.

    TypeError for what has no way back.
    """
    match value:
        case enum.Enum():
            return value.value
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case tuple():
            return [to_json(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
        case _:
            raise TypeError(f"{type(value).__name__} cannot be stored exactly: {value!r}")


def from_json(kind: type[T], data: object) -> T:
    """The value that `to_json` was given. Fields that `kind` does not know are passed over, and missing ones
    take their defaults, so that an older or newer version's data is read too. StoredError otherwise.
    """
    return typing.cast(T, _read(kind, data, kind.__name__))


def _read(kind: Any, data: object, at: str) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        given = [each for each in arguments if each is not type(None)]
        return _read(given[0], data, at)
    if origin is tuple:
        return _tuple(arguments, data, at)
    if is_dataclass(kind):
        return _dataclass(kind, data, at)
    return _plain(kind, data, at)


def _dataclass(kind: Any, data: object, at: str) -> object:
    if not isinstance(data, Mapping):
        raise StoredError(f"{at}: expected an object, found {_named(data)}")
    hints = _hints(kind)
    values: dict[str, object] = {}
    for field in fields(kind):
        if field.name in data:
            values[field.name] = _read(hints[field.name], data[field.name], f"{at}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise StoredError(f"{at}: '{field.name}' is missing")
    return kind(**values)


def _tuple(arguments: tuple[Any, ...], data: object, at: str) -> tuple[object, ...]:
    if not isinstance(data, list | tuple):
        raise StoredError(f"{at}: expected a list, found {_named(data)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], item, f"{at}[{place}]") for place, item in enumerate(data))
    if len(data) != len(arguments):
        raise StoredError(f"{at}: expected {len(arguments)} entries, found {len(data)}")
    return tuple(
        _read(each, item, f"{at}[{place}]")
        for place, (each, item) in enumerate(zip(arguments, data, strict=True))
    )


def _plain(kind: Any, data: object, at: str) -> object:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError:
            known = ", ".join(str(each.value) for each in kind)
            raise StoredError(f"{at}: {data!r} is none of {known}") from None
    if kind is float:
        number = float(data) if data in ("nan", "inf", "-inf") and isinstance(data, str) else data
        if isinstance(number, int | float) and not isinstance(number, bool):
            return float(number)
    elif kind is int and isinstance(data, bool):
        pass
    elif isinstance(data, kind):
        return data
    raise StoredError(f"{at}: expected {kind.__name__}, found {_named(data)}")


def _named(data: object) -> str:
    return f"{type(data).__name__} {data!r:.60}"


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)
