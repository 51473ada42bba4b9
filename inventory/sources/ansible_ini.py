"""Ansible's INI notation: ``[group]``, ``[group:children]``, ``[group:vars]``, host lines with variables."""

from __future__ import annotations

import ast
import re
import shlex

from inventory.errors import DocumentError
from inventory.sources.ansible_model import Inventory, expand

_SECTION = re.compile(r"\[([^:\[\]\s]+)(?::(\w+))?\]\s*(?:[#;].*)?")


def read_ini(inventory: Inventory, file: str, text: str) -> None:
    """Add what the text says to `inventory`; DocumentError for the first line that is wrong."""
    group, kind = "ungrouped", "hosts"
    used: dict[str, int] = {}
    known = set(inventory.groups) | {"all", "ungrouped"}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and (found := _SECTION.fullmatch(line)):
            group, kind = found[1], found[2] or "hosts"
            if kind not in ("hosts", "children", "vars"):
                raise DocumentError(
                    file, number, line, "a section is [group], [group:children] or [group:vars]"
                )
            if kind == "vars":
                used.setdefault(group, number)
            else:
                known.add(group)
                inventory.group(group)
        elif kind == "vars":
            key, equals, value = line.partition("=")
            if not equals:
                raise DocumentError(file, number, line, "a variable is written NAME=VALUE")
            inventory.group(group).vars[key.strip()] = _value(value.strip())
        elif kind == "children":
            child = line.partition("#")[0].strip()
            used.setdefault(child, number)
            inventory.group(group).children[child] = None
        else:
            _host_line(inventory, group, file, number, line)
    for name, number in used.items():
        if name not in known:
            raise DocumentError(file, number, name, "this group is used here but declared nowhere")


def _host_line(inventory: Inventory, group: str, file: str, number: int, line: str) -> None:
    try:
        name, *words = shlex.split(line, comments=True) or [""]
    except ValueError as error:
        raise DocumentError(file, number, "", f"{str(error).lower()}: {line}") from None
    if not name:
        return
    names, port = expand(name, file, number)
    said: dict[str, object] = {} if port is None else {"ansible_port": port}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise DocumentError(file, number, name, f"'{word}' is not NAME=VALUE; one host stands on a line")
        said[key] = _value(value)
    for one in names:
        inventory.group(group).hosts[one] = None
        inventory.host(one, file, number).vars.update(said)


def _value(text: str) -> object:
    """Ansible reads a Python literal where it is one, text otherwise."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text
