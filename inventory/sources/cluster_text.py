"""Writes a fleet as ``cluster.yaml``; reading the text gives an equal fleet."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from inventory.errors import UsageError
from inventory.fleet import Bmc, Fleet, Node, fold
from inventory.nodeset import declared

HOISTED = ("user", "port", "jump", "identity", "sku", "accelerators", "python")
"""Attributes that go to ``defaults`` when every node has the same."""


def to_yaml(fleet: Fleet) -> str:
    """The text of a ``cluster.yaml``; nodes are folded where their attributes are equal or run along."""
    said = {node.name: _attributes(node) for node in fleet.nodes.values()}
    defaults = _hoist(said.values()) if len(said) > 1 else {}
    sharing = _sharing(fleet)
    alike: dict[str, list[str]] = defaultdict(list)
    for name, attributes in said.items():
        for key in defaults:
            del attributes[key]
        if name in sharing:
            attributes["shared_address"] = True
        alike[_shape(name, attributes)].append(name)
    lines = [f"cluster: {_flow(fleet.name)}"]
    if defaults:
        lines.append(f"defaults: {_flow(defaults)}")
    if fleet.groups:
        lines.append("groups:")
        lines += [f"  {_flow(group)}: {_flow(fold(members))}" for group, members in fleet.groups.items()]
    lines.append("nodes:")
    for names in alike.values():
        for term in declared(fold(names)).terms:
            members = term.names()
            entry = _entry(members, [said[name] for name in members])
            lines.append(f"  {_flow(term.text)}: {_flow(entry) if entry else ''}".rstrip())
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Everything on one line, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def one_line(self, text: str) -> yaml.ScalarNode:
        style = '"' if re.search(r"[\n\r\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.one_line)


def _flow(value: object) -> str:
    """A value as YAML on one line, quoted where it must be."""
    try:
        listed = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf)
    except yaml.representer.RepresenterError as error:
        raise UsageError(f"a variable holds what YAML cannot: {error.args[-1]!r}") from None
    return str(listed).strip()[1:-1]


def _shape(name: str, attributes: Mapping[str, Any]) -> str:
    """Equal for nodes that one entry can declare: the same attributes, the paired ones running alike."""
    shape = dict(attributes)
    if "address" in shape:
        shape["address"] = _course(name, shape["address"])
    if "port" in shape:
        shape["port"] = "paired"
    if "bmc" in shape:
        kind = next(iter(shape["bmc"]))
        course = _course(name, shape["bmc"][kind])
        # One controller for several nodes cannot be written for a range without numbers to repeat.
        shape["bmc"] = {
            **shape["bmc"],
            kind: course if "\0" in course or "{name}" in course else f"{name} {course}",
        }
    return json.dumps(shape, sort_keys=True, default=str)


def _course(name: str, value: str) -> str:
    """The value with the node's name, or else its last number, taken out."""
    if name in value and not name.isdecimal():
        return value.replace(name, "{name}")
    return _LAST_NUMBER.sub("\\1\0\\3", value)


_LAST_NUMBER = re.compile(r"^(.*?)(?<![0-9])([0-9]{1,15})([^0-9]*)$", re.DOTALL)


def _entry(names: Sequence[str], said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entry = dict(said[0])
    if len(names) == 1:
        return entry
    if "address" in entry:
        entry["address"] = _run(names, [one["address"] for one in said], repeat=False)
    if "port" in entry:
        port = _run(names, [str(one["port"]) for one in said], repeat=False)
        entry["port"] = int(port) if port.isdecimal() else port
    if "bmc" in entry:
        kind = next(iter(entry["bmc"]))
        addresses = [one["bmc"][kind] for one in said]
        entry["bmc"] = {**entry["bmc"], kind: _run(names, addresses, repeat="shared_address" not in entry)}
    return entry


def _run(names: Sequence[str], values: Sequence[str], repeat: bool) -> str:
    """Values of one course as one text: ``10.0.0.[1-64]`` or ``{name}.lab``; equal ones once, or repeated."""
    course = _course(names[0], values[0])
    if "{name}" in course:
        return course
    if len(set(values)) == 1 and not repeat:
        return values[0]
    found = [_LAST_NUMBER.fullmatch(value) for value in values]
    numbers = [match[2] for match in found if match]
    return course.replace("\0", f"[{_ranges(numbers)}]")


def _ranges(numbers: Sequence[str]) -> str:
    """``1, 2, 3, 9`` as ``1-3,9``; order, repetitions and zero padding stay as they are."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and _follows(runs[-1], number):
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _follows(run: Sequence[str], number: str) -> bool:
    width = len(run[0]) if run[0].startswith("0") and len(run[0]) > 1 else 0
    return number == str(int(run[-1]) + 1).zfill(width) and (not width or len(number) == width)


def _attributes(node: Node) -> dict[str, Any]:
    said: dict[str, Any] = {
        "address": node.address,
        "user": node.user,
        "port": node.port,
        "jump": node.jump,
        "identity": node.identity,
        "sku": node.sku,
        "accelerators": node.accelerators,
        "labels": dict(node.labels) or None,
        "bmc": None if node.bmc is None else _bmc(node.bmc),
        "python": None if node.python == "python3" else node.python,
        "vars": dict(node.vars) or None,
        "local": node.local or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def _bmc(bmc: Bmc) -> dict[str, Any]:
    said = {
        bmc.kind: bmc.address,
        "user": bmc.user,
        "password_env": bmc.password_env,
        "password_file": bmc.password_file,
        "verify_tls": None if bmc.verify_tls else False,
    }
    return {key: value for key, value in said.items() if value is not None}


def _hoist(said: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    every = list(said)
    return {
        key: every[0][key]
        for key in HOISTED
        if key in every[0] and all(key in one and one[key] == every[0][key] for one in every)
    }


def _sharing(fleet: Fleet) -> frozenset[str]:
    """Nodes whose address, port and way are another's too."""
    same: dict[Hashable, list[str]] = defaultdict(list)
    for node in fleet.nodes.values():
        same["local" if node.local else (node.host, node.port or 22, node.jump)].append(node.name)
    return frozenset(name for names in same.values() if len(names) > 1 for name in names)
