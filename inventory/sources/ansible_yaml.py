"""Ansible's YAML notation, and the JSON that ``ansible-inventory --list`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from inventory.document import Document, Place, kind, read
from inventory.sources.ansible_model import VAULTED, Inventory, expand


def read_yaml(inventory: Inventory, file: str, text: str) -> None:
    """Add what the text says to `inventory`; DocumentError for the first thing that is wrong."""
    document = read(file, text, loader=_AnsibleLoader)
    if document.data is None:
        return
    if not isinstance(document.data, dict):
        raise document.error((), f"expected a mapping of groups, found {kind(document.data)}")
    for name, said in document.data.items():
        if name == "_meta":
            _meta(inventory, document, said)
        else:
            _group(inventory, document, (name,), said)


def read_vars(file: str, text: str) -> dict[str, Any]:
    """A file of variables (under group_vars or host_vars); one that is vaulted as a whole says nothing."""
    if text.startswith("$ANSIBLE_VAULT"):
        return {}
    document = read(file, text, loader=_AnsibleLoader)
    if document.data is None:
        return {}
    if not isinstance(document.data, dict):
        raise document.error((), f"expected variables, found {kind(document.data)}")
    return {key: _plain(value) for key, value in document.data.items()}


class _AnsibleLoader(yaml.CSafeLoader):
    """YAML with Ansible's own tags."""

    def unsafe(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.construct_yaml_str(node)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        assert isinstance(node, yaml.MappingNode)
        return self.construct_mapping(node, deep=True)


_AnsibleLoader.add_constructor("!unsafe", _AnsibleLoader.unsafe)
for _tag in ("!vault", "!vault-encrypted"):
    _AnsibleLoader.add_constructor(_tag, lambda _loader, _node: VAULTED)


def _group(inventory: Inventory, document: Document, place: Place, said: Any) -> None:
    name = str(place[-1])
    group = inventory.group(name)
    if isinstance(said, list):
        said = {"hosts": said}
    for key, value in _mapping(document, place, said).items():
        here = (*place, key)
        match key:
            case "hosts":
                for pattern, variables, where in _named(document, here, value):
                    names, port = expand(pattern, document.file, document.line(where))
                    extra = {} if port is None else {"ansible_port": port}
                    for host in names:
                        group.hosts[host] = None
                        inventory.host(host, document.file, document.line(where)).vars.update(
                            extra | variables
                        )
            case "children":
                for child, _, where in _named(document, here, value, deep=False):
                    group.children[child] = None
                    inventory.group(child)
                    if isinstance(value, dict):
                        _group(inventory, document, where, value[child])
            case "vars":
                group.vars.update({k: _plain(v) for k, v in _mapping(document, here, value).items()})
            case _:
                message = "a group has hosts, children and vars; this is none of them"
                raise document.error(here, message)


def _named(
    document: Document, place: Place, value: Any, deep: bool = True
) -> list[tuple[str, dict[str, Any], Place]]:
    """(name, variables, place) of ``hosts`` or ``children``, which JSON gives as a list of names."""
    if isinstance(value, str):
        value = {value: None}
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise document.error(place, "expected a list of names")
        return [(item, {}, (*place, i)) for i, item in enumerate(value)]
    found = []
    for name, inner in _mapping(document, place, value).items():
        where = (*place, name)
        variables = _mapping(document, where, inner) if deep else {}
        found.append((name, {k: _plain(v) for k, v in variables.items()}, where))
    return found


def _meta(inventory: Inventory, document: Document, said: Any) -> None:
    hostvars = _mapping(document, ("_meta",), said).get("hostvars")
    for name, variables in _mapping(document, ("_meta", "hostvars"), hostvars).items():
        place: Place = ("_meta", "hostvars", name)
        host = inventory.host(name, document.file, document.line(place))
        host.vars.update({k: _plain(v) for k, v in _mapping(document, place, variables).items()})


def _mapping(document: Document, place: Place, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise document.error(place, f"expected a mapping, found {kind(value)}")
    return value


def _plain(value: Any) -> Any:
    """``ansible-inventory`` writes vaulted and unsafe values as mappings with one telling key."""
    if isinstance(value, dict):
        if "__ansible_vault" in value:
            return VAULTED
        if set(value) == {"__ansible_unsafe"}:
            return value["__ansible_unsafe"]
    return value


def is_yaml(file: str, text: str) -> bool:
    """Whether a file is YAML or JSON rather than INI, by its name, else by its first line with content."""
    if Path(file).suffix in (".yml", ".yaml", ".json"):
        return True
    if Path(file).suffix in (".ini", ".cfg"):
        return False
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and line[0] not in "#;"), "")
    return first.startswith(("---", "{")) or (first.endswith(":") and "=" not in first and " " not in first)
