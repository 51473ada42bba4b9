"""A configuration from a file, the presets under it and the overrides over it.

A file may begin with ``preset: NAME`` (one that is built in) or ``preset: ./other.yaml``, and is then laid
over it: sections merge key by key, lists and values replace. Overrides (``--set model.layers=4``) come last.
Where a path may stand for what is read (``data.sources.prefix``, ``run.initial_weights``), it is relative to
the file that it is written in, in an override to the working directory; folders that are written are always
relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ltf.config import agreement, document, fields
from ltf.config.document import Place, field_name
from ltf.config.errors import ConfigError, Mistake, kind
from ltf.config.fields import Setting
from ltf.config.layers import Layer, of_document, override
from ltf.config.schema import Config
from ltf.model.args import ModelArgsError

__all__ = ["ConfigError", "presets", "read"]

READ_PATHS = (
    ("run", "initial_weights"),
    ("data", "sources", "*", "prefix"),
    ("data", "evaluation", "sources", "*", "prefix"),
)
WRITTEN_PATHS = (("run", "output"), ("checkpoint", "directory"), ("data", "cache"))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration; `path` is a file, or the name of a preset where no such file is.

    ConfigError holds all mistakes that could be found, each with its place and its fix.
    """
    layer = _base(path)
    for text in overrides:
        layer = override(layer, text)
    if wrong := _unknown(layer, layer.data, fields.settings(), ()):
        raise ConfigError(wrong)
    config = _checked(layer)
    if found := agreement.disagreements(config):
        raise ConfigError([_located(layer, one) for one in found])
    return config


def presets() -> dict[str, Path]:
    """The built-in presets by name."""
    folder = Path(str(files("ltf"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _base(path: str | Path) -> Layer:
    file, name = Path(path), str(path)
    # A folder of that name may well be what an earlier run of the preset has written.
    if not file.is_file() and name in presets():
        file = presets()[name]
    elif not file.exists() and file.suffix not in (".yaml", ".yml"):
        expected = f"a file, or one of the presets {', '.join(presets())}"
        raise ConfigError([Mistake(name, "", "no such file", expected, _near(name, presets()))])
    return _file(file, ())


def _file(file: Path, above: tuple[Path, ...]) -> Layer:
    layer = of_document(document.load(file))
    if "preset" not in layer.data:
        return layer
    asked = layer.data.pop("preset")
    origin = layer.origin(("preset",))
    where = origin.text if origin else str(file)
    expected = f"a file (./other.yaml) or one of {', '.join(presets())}"
    if not isinstance(asked, str):
        raise ConfigError([Mistake(where, "preset", kind(asked), expected, "name one")])
    if "/" in asked or asked.endswith((".yaml", ".yml")):
        below = file.parent / Path(asked).expanduser()
        if not below.is_file():
            raise ConfigError([Mistake(where, "preset", f"no file {below}", expected, "correct the path")])
    elif asked in presets():
        below = presets()[asked]
    else:
        raise ConfigError([Mistake(where, "preset", repr(asked), expected, _near(asked, presets()))])
    chain = (*above, file.resolve())
    if below.resolve() in chain:
        fix = "remove one `preset:` of the circle"
        raise ConfigError([Mistake(where, "preset", f"{asked}, which rests on this file", "another", fix)])
    return layer.over(_file(below, chain))


def _unknown(layer: Layer, data: Any, known: Mapping[str, Setting], place: Place) -> list[Mistake]:
    """Every key that no setting has, in the whole tree."""
    wrong: list[Mistake] = []
    for key, value in data.items():
        inner = (*place, key)
        setting = known.get(key)
        if setting is None:
            wrong.append(_unknown_key(layer, inner, key, known))
        elif isinstance(value, dict) and setting.children and not setting.listed:
            wrong += _unknown(layer, value, setting.children, inner)
        elif isinstance(value, list) and setting.listed:
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    wrong += _unknown(layer, item, setting.children, (*inner, index))
    return wrong


def _unknown_key(layer: Layer, place: Place, key: str, known: Mapping[str, Setting]) -> Mistake:
    if key == "preset" and len(place) == 1:
        fix = "name it in the file, or as CONFIG itself"
        return _mistake(layer, place, "a preset in an override", "a setting", fix)
    if difflib.get_close_matches(key, known, n=1):
        fix = _near(key, known)
    elif sections := [name for name, one in fields.settings().items() if key in one.children]:
        fix = f"it belongs in {' or '.join(sections)}"
    else:
        fix = "remove it"
    return _mistake(layer, place, "an unknown key", f"one of {', '.join(known)}", fix)


def _checked(layer: Layer) -> Config:
    data = json.loads(json.dumps(layer.data))
    _settle_paths(layer, data)
    try:
        # Strict, so that neither `true` nor "4" passes for a number; JSON, so that lists may be tuples.
        return Config.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError(_mistakes(layer, error)) from None


def _settle_paths(layer: Layer, data: Any) -> None:
    for pattern in READ_PATHS:
        for place in _matching(data, pattern, ()):
            origin = layer.origin(place)
            if isinstance(value := _get(data, place), str) and origin is not None:
                _put(data, place, str(origin.folder / Path(value).expanduser()))
    for pattern in WRITTEN_PATHS:
        for place in _matching(data, pattern, ()):
            if isinstance(value := _get(data, place), str):
                _put(data, place, str(Path(value).expanduser()))


def _matching(data: Any, pattern: Sequence[str], place: Place) -> list[Place]:
    if not pattern:
        return [place]
    if pattern[0] == "*":
        items = range(len(data)) if isinstance(data, list) else range(0)
        return [found for i in items for found in _matching(data[i], pattern[1:], (*place, i))]
    if not isinstance(data, dict) or pattern[0] not in data:
        return []
    return _matching(data[pattern[0]], pattern[1:], (*place, pattern[0]))


def _get(data: Any, place: Place) -> Any:
    for key in place:
        data = data[key]
    return data


def _put(data: Any, place: Place, value: Any) -> None:
    _get(data, place[:-1])[place[-1]] = value


def _mistakes(layer: Layer, error: ValidationError) -> list[Mistake]:
    """One for each place: pydantic has an error for every alternative of a type."""
    found: dict[Place, Mistake] = {}
    for one in error.errors():
        if one["type"] == "value_error" and isinstance(
            cause := one.get("ctx", {}).get("error"), ModelArgsError
        ):
            place: Place = ("model", *cause.field.split("."))
            found.setdefault(place, _mistake(layer, place, kind(cause.found), cause.expected, cause.fix))
            continue
        place = _place_of(layer.data, one)
        found.setdefault(place, _of_type(layer, place, one))
    return list(found.values())


def _of_type(layer: Layer, place: Place, error: ErrorDetails) -> Mistake:
    setting = fields.at(place)
    expected = setting.expected if setting else "another value"
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        found = f"a list of {len(error['input'])}"
        return _mistake(layer, place, found, expected, "give them all")
    if error["type"] == "missing":
        fix = (
            f"add `{place[-1]}`"
            if len(place) > 1
            else f"add the section, or begin with `preset: {_SMALLEST}`"
        )
        return _mistake(layer, place, "nothing", expected, fix)
    value = error["input"]
    if len(place) and isinstance(place[-1], int) and setting:
        expected = setting.expected.partition("each ")[2] or expected
    return _mistake(layer, place, kind(value), expected, _correction(value, expected))


def _correction(value: Any, expected: str) -> str:
    match value:
        case float() if "whole number" in expected and value.is_integer():
            return f"write {int(value)}"
        case str() if "number" in expected and isinstance(document.plain(value), (int, float)):
            return "take away the quotes"
        case str() if near := difflib.get_close_matches(value, _words(expected), n=1):
            return f"did you mean {near[0]!r}?"
        case str() if "true or false" in expected and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"write {str(value.lower() in ('yes', 'on', 'y')).lower()}"
        case _:
            return "correct the value"


def _words(expected: str) -> list[str]:
    return [word.strip(",") for word in expected.split()]


def _place_of(data: Any, error: ErrorDetails) -> Place:
    """pydantic's path without the names of alternatives, which are no keys of the data."""
    place: Place = ()
    for position, key in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if isinstance(data, dict) and (key in data or (last and error["type"] == "missing")):
            place, data = (*place, key), data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            place, data = (*place, key), data[key]
    return place


def _located(layer: Layer, found: Mistake) -> Mistake:
    place = tuple(int(key) if key.isdecimal() else key for key in found.field.split("."))
    return _mistake(layer, place, found.found, found.expected, found.fix)


def _mistake(layer: Layer, place: Place, found: str, expected: str, fix: str) -> Mistake:
    origin = layer.origin(place)
    return Mistake(origin.text if origin else "", field_name(place), found, expected, fix)


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "correct the name"


_SMALLEST = "tiny"
