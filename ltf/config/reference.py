"""Every setting of a configuration as a Markdown page, from the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltf.config.fields import Setting, settings
from ltf.config.read import presets

INTRODUCTION = """\
# Configuration of a training run

A YAML file of the sections below; `python -m ltf train CONFIG` and `python -m ltf estimate CONFIG` read it.

It may begin with `preset: NAME` or `preset: ./other.yaml` and is then laid over that one: sections merge key
by key, lists and values replace. `--set SECTION.KEY=VALUE` comes last; VALUE is YAML, and numbers count a
list's items from 0 (`--set data.sources.0.weight=2`).

Paths that are read (`prefix`, `initial_weights`) are relative to the file that they are written in, with
`--set` to the working directory; folders that are written are relative to the working directory.
"""


def markdown() -> str:
    """The whole page: an introduction, the presets' names, and a table for each section."""
    text = f"{INTRODUCTION}\nPresets: {', '.join(f'`{name}`' for name in presets())}.\n"
    for name, section in settings().items():
        text += _table(name, section)
    return text


def _table(name: str, section: Setting) -> str:
    said = "\n\n".join(part for part in (section.meaning, section.notes) if part)
    text = f"\n## {name}\n\n{said}\n\n| setting | value | default | meaning |\n|---|---|---|---|\n"
    for key, setting in _leaves(section.children, name):
        said = " ".join(part for part in (setting.meaning, setting.notes) if part)
        cells = (f"`{key}`", setting.expected, _default(setting), said)
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def _leaves(children: Mapping[str, Setting], path: str) -> list[tuple[str, Setting]]:
    """What can be set, depth first; a section that may be left out, or repeats, has a line of its own."""
    found: list[tuple[str, Setting]] = []
    for key, setting in children.items():
        name = f"{path}.{key}"
        if not setting.children or setting.listed or setting.default is None or setting.notes:
            found.append((name, setting))
        found += _leaves(setting.children, f"{name}.N" if setting.listed else name)
    return found


def _default(setting: Setting) -> str:
    if setting.required:
        return "required"
    if setting.children and not setting.listed and setting.default is not None:
        return "as below"
    return _written(setting.default)


def _written(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return f"`{str(value).lower()}`"
        case list() | tuple():
            return f"`[{', '.join(_written(one).strip('`') for one in value)}]`"
        case _:
            return f"`{value}`"
