"""Files and overrides laid one over the other, with where every value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltf.config import document
from ltf.config.document import Place, field_name
from ltf.config.errors import ConfigError, Mistake, kind


@dataclass(frozen=True)
class Origin:
    """`text`: ``FILE:LINE`` or ``--set KEY=VALUE``. `folder`: what its relative paths start from."""

    text: str
    folder: Path


@dataclass(frozen=True)
class Layer:
    """`data`: plain YAML data. `origins`: of the places that a file or an override wrote."""

    data: dict[str, Any]
    origins: Mapping[Place, Origin]

    def origin(self, place: Place) -> Origin | None:
        """Of the place, or of the nearest one around it."""
        for length in range(len(place), -1, -1):
            if (found := self.origins.get(place[:length])) is not None:
                return found
        return None

    def over(self, base: Layer) -> Layer:
        """Mappings merge key by key; everything else, lists too, replaces what was there."""
        origins = dict(base.origins)
        return Layer(_merged(base.data, self.data, (), origins, self.origins), origins)


def of_document(read: document.Document) -> Layer:
    """ConfigError unless the document is a mapping."""
    data = {} if read.data is None else read.data
    if not isinstance(data, dict):
        fix = "write sections such as `model:` at the beginning of a line"
        raise ConfigError([Mistake(f"{read.file}:1", "", kind(data), "a mapping of keys to values", fix)])
    folder = Path(read.file).parent
    return Layer(data, {place: Origin(f"{read.file}:{line}", folder) for place, line in read.lines.items()})


def override(base: Layer, text: str) -> Layer:
    """Lay one ``a.b.c=VALUE`` over `base`; VALUE is YAML, numbers in the key count a list's items from 0."""
    where = f"--set {text}"
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        fix = "for example --set model.layers=4"
        raise ConfigError([Mistake(where, "", repr(text), "KEY=VALUE with a dotted key", fix)])
    try:
        parsed = document.parse(value, where).data
    except ConfigError as error:
        raise ConfigError([_moved(error.mistakes[0], where)]) from None
    origin = Origin(where, Path())
    place = _place(base.data, names, where)
    return _written(base, place, parsed, origin)


def _place(data: Any, names: list[str], where: str) -> Place:
    """The dotted names as keys and indices of `data`; an index one past the end adds an item."""
    place: Place = ()
    for name in names:
        if isinstance(data, list):
            index = int(name) if name.isdecimal() else -1
            if not 0 <= index <= len(data):
                expected = f"an index from 0 to {len(data)}" if data else "the index 0"
                raise ConfigError(
                    [
                        Mistake(
                            where, field_name(place), repr(name), expected, f"the list has {len(data)} items"
                        )
                    ]
                )
            place = (*place, index)
            data = data[index] if index < len(data) else None
        else:
            if data is not None and not isinstance(data, dict):
                fix = "set that key itself, or correct the name"
                raise ConfigError(
                    [Mistake(where, field_name(place), kind(data), f"a section with a key {name!r}", fix)]
                )
            # A list that is not there yet begins with its item 0.
            place = (*place, 0 if data is None and name == "0" and place else name)
            data = None if data is None else data.get(name)
    return place


def _written(base: Layer, place: Place, value: Any, origin: Origin) -> Layer:
    origins = dict(base.origins)
    wrapped = _around(base.data, place, value)
    # A list is replaced whole by a merge, so the origins of its items are kept by hand.
    kept = {p: o for p, o in origins.items() if any(isinstance(k, int) for k in p)}
    data = _merged(base.data, wrapped, (), origins, {})
    origins.update(kept)
    for inner in [p for p in origins if p[: len(place)] == place]:
        if not isinstance(value, dict) or len(inner) == len(place):
            del origins[inner]
    for inner in _places(value, place):
        origins[inner] = origin
    for length in range(1, len(place)):
        # What the override itself made into a section is its own.
        if not isinstance(_found(base.data, place[:length]), (dict, list)):
            origins[place[:length]] = origin
    return Layer(data, origins)


def _found(data: Any, place: Place) -> Any:
    for key in place:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return None
    return data


def _around(data: Any, place: Place, value: Any) -> Any:
    """`value` inside the containers that lead to it, those of `data` where they are lists."""
    if not place:
        return value
    key, rest = place[0], place[1:]
    if isinstance(key, int):
        items = list(data) if isinstance(data, list) else []
        inner = items[key] if key < len(items) else None
        below = _around(inner, rest, value)
        if isinstance(inner, dict) and isinstance(below, dict):
            below = _merged(inner, below, (), {}, {})
        items[key : key + 1] = [below]
        return items
    inner = data.get(key) if isinstance(data, dict) else None
    return {str(key): _around(inner, rest, value)}


def _merged(
    base: Any, top: Any, place: Place, origins: dict[Place, Origin], new: Mapping[Place, Origin]
) -> Any:
    if place in new:
        origins[place] = new[place]
    if isinstance(base, dict) and isinstance(top, dict):
        both = dict(base)
        for key, value in top.items():
            inner = (*place, key)
            both[key] = _merged(base.get(key), value, inner, origins, new)
        return both
    for gone in [p for p in origins if len(p) > len(place) and p[: len(place)] == place]:
        del origins[gone]
    origins.update({p: o for p, o in new.items() if p[: len(place)] == place})
    return top


def _places(value: Any, place: Place) -> list[Place]:
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*place, key))
    return found


def _moved(mistake: Mistake, where: str) -> Mistake:
    return Mistake(where, "", mistake.found, mistake.expected, mistake.fix)
