"""Which variables hold for a host of an Ansible inventory, by Ansible's order of precedence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inventory.document import read_text
from inventory.errors import DocumentError
from inventory.sources.ansible_model import Host, Inventory, Vaulted
from inventory.sources.ansible_yaml import read_vars

TEMPLATE_DEPTH = 8
"""Variables whose templates name further variables, at most so far."""


class Variables:
    """``all`` < groups from far to near < group_vars files < the host's own < host_vars files."""

    def __init__(self, inventory: Inventory, folder: Path, file: str) -> None:
        self.inventory, self.folder, self.file = inventory, folder, file
        self._merged: dict[tuple[str, ...], dict[str, Any]] = {}
        self._members: dict[str, frozenset[str]] = {}
        self._depth = self._depths()
        self._groups_of: dict[str, list[str]] = {}
        for group in inventory.groups:
            for host in self.members(group):
                self._groups_of.setdefault(host, []).append(group)

    def members(self, group: str) -> frozenset[str]:
        """Hosts of the group and of its children."""
        if group not in self._members:
            said = self.inventory.groups[group]
            self._members[group] = frozenset(said.hosts).union(*(self.members(c) for c in said.children))
        return self._members[group]

    def of(self, host: Host) -> dict[str, Any]:
        """Variables of one host; templates are still as written."""
        groups = tuple(sorted(self._groups_of.get(host.name, ()), key=self._rank))
        if groups not in self._merged:
            self._merged[groups] = self._of_groups(groups)
        return self._merged[groups] | host.vars | self._from_folder("host_vars", host.name)

    def _of_groups(self, groups: tuple[str, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        everyone = self.inventory.groups.get("all")
        if everyone:
            merged |= everyone.vars
        near = [group for group in groups if group != "all"]
        for group in near:
            merged |= self.inventory.groups[group].vars
        for group in ["all", *near]:
            merged |= self._from_folder("group_vars", group)
        return merged

    def _rank(self, group: str) -> tuple[int, int, str]:
        priority = self.inventory.groups[group].vars.get("ansible_group_priority", 1)
        return self._depth[group], int(priority) if str(priority).isdecimal() else 1, group

    def _depths(self) -> dict[str, int]:
        """How far each group is from the top; DocumentError where groups contain each other."""
        depth = dict.fromkeys(self.inventory.groups, 0)
        waiting = dict.fromkeys(self.inventory.groups, 0)
        for group in self.inventory.groups.values():
            for child in group.children:
                waiting[child] += 1
        ready = [group for group, parents in waiting.items() if not parents]
        while ready:
            parent = ready.pop()
            for child in self.inventory.groups[parent].children:
                depth[child] = max(depth[child], depth[parent] + 1)
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
        if circle := sorted(group for group, parents in waiting.items() if parents):
            raise DocumentError(self.file, None, "", f"groups contain each other: {', '.join(circle)}")
        return depth

    def _from_folder(self, kind: str, name: str) -> dict[str, Any]:
        """``group_vars/NAME``, with .yml, .yaml or .json, or every file of a folder of that name."""
        merged: dict[str, Any] = {}
        if not (self.folder / kind).is_dir():
            return merged
        for suffix in ("", ".yml", ".yaml", ".json"):
            found = self.folder / kind / f"{name}{suffix}"
            if found.exists():
                for file in _plain_files(found):
                    merged |= read_vars(str(file), read_text(file))
                break
        return merged


def filled(text: str, said: Mapping[str, Any], host: str, depth: int = 0) -> str:
    """`text` with every ``{{ variable }}`` filled in; ValueError for any other template."""

    def value(found: re.Match[str]) -> str:
        name = found[1].strip()
        if name == "inventory_hostname":
            return host
        if name == "inventory_hostname_short":
            return host.partition(".")[0]
        if not name.isidentifier() or name not in said or isinstance(said[name], Vaulted | dict | list):
            raise ValueError(f"the template '{found[0]}' cannot be filled in here; write the value itself")
        if depth >= TEMPLATE_DEPTH:
            raise ValueError(f"the template '{found[0]}' leads back to itself")
        return filled(str(said[name]), said, host, depth + 1)

    if "{%" in text:
        raise ValueError("templates with {% %} cannot be filled in here; write the value itself")
    return re.sub(r"\{\{(.*?)\}\}", value, text)


def _plain_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir():
            yield from _plain_files(child)
        elif not child.name.startswith(".") and child.suffix in ("", ".yml", ".yaml", ".json"):
            yield child
