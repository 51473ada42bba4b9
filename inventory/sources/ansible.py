"""Ansible inventories: INI, YAML, the JSON of ``ansible-inventory --list``, and folders of these.

Understood of Ansible's own variables: ansible_host, ansible_port, ansible_user, the private key, the Python
interpreter, ``ansible_connection: local`` and a jump host in the SSH arguments. Our own, where Ansible has no
word: ltp_sku, ltp_accelerators, ltp_rack, ltp_switch, ltp_labels. Other variables are kept, except secrets.
Nothing is executed, no vault is opened, and of templates only ``{{ variable }}`` is filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inventory.document import read_text
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Fleet, Node
from inventory.nodeset import NAME
from inventory.sources.ansible_ini import read_ini
from inventory.sources.ansible_model import Host, Inventory, Vaulted
from inventory.sources.ansible_vars import Variables, filled
from inventory.sources.ansible_yaml import is_yaml, read_yaml
from inventory.sources.ssh_arguments import jump_of

SECRET = re.compile(
    r"pass(word|wd|phrase)?(_|$)|secret|token|credential|private_key|api_?key|vault", re.IGNORECASE
)
"""Variables with such names are left out: an inventory here never holds secrets."""

NOT_READ = frozenset({".orig", ".bak", ".cfg", ".retry", ".pyc", ".pyo", ".rst", ".md", ".txt", ".csv"})
"""Suffixes that do not count in an inventory folder: Ansible's own list and a few more."""


def recognises(path: str, text: str) -> bool:
    """INI sections or Ansible's variables; in YAML the words all, hosts, children or _meta."""
    if is_yaml(path, text):
        return re.search(r"""(^|[{,])\s*['"]?(all|hosts|children|_meta)['"]?\s*:""", text, re.M) is not None
    return re.search(r"^\[[^\]:\s]+(:\w+)?\]\s*$|\bansible_\w+\s*=", text, re.MULTILINE) is not None


def read(path: str, text: str | None = None) -> Fleet:
    """The fleet of an Ansible inventory; DocumentError for the first thing that is not understood."""
    inventory = Inventory()
    for file, content in _files(path) if text is None else [(path, text)]:
        if content.startswith("#!"):
            raise _dynamic(file)
        (read_yaml if is_yaml(file, content) else read_ini)(inventory, file, content)
    if not inventory.hosts:
        raise DocumentError(path, None, "", "no host is declared")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    variables = Variables(inventory, folder, path)
    nodes = [_node(host, variables.of(host)) for host in inventory.hosts.values()]
    groups = {name: variables.members(name) for name in inventory.groups if name not in ("all", "ungrouped")}
    # Ansible lets a group be named as its only host; the host's name then already says it.
    groups = {name: members for name, members in groups.items() if members != {name}}
    return Fleet.build("ansible", nodes, groups, source=path)


def _files(path: str) -> list[tuple[str, str]]:
    top = Path(path)
    found = [top]
    if top.is_dir():
        found = [
            child
            for child in sorted(top.iterdir())
            if child.is_file()
            and child.name[0] != "."
            and child.name[-1] != "~"
            and child.suffix not in NOT_READ
        ]
    for file in found:
        if file.is_file() and file.stat().st_mode & 0o111:
            raise _dynamic(str(file))
    return [(str(file), read_text(file)) for file in found]


def _dynamic(file: str) -> UsageError:
    return DocumentError(
        file,
        None,
        "",
        "is marked executable, so Ansible would run it; nothing is run here. Give what it prints: "
        f"ansible-inventory -i {file} --list > hosts.json (or, if it is plain data: chmod -x)",
    )


def _node(host: Host, said: Mapping[str, Any]) -> Node:
    if not NAME.fullmatch(host.name):
        message = "this name cannot be used; names are letters, digits and '_', then also '-', '.' and ':'"
        raise DocumentError(host.file, host.line, host.name, message)
    of = _Reader(host, said)
    address = of.text("ansible_host", "ansible_ssh_host")
    python = of.text("ansible_python_interpreter") or ""
    labels = of.labels()
    for label in ("rack", "switch"):
        if value := of.text(f"ltp_{label}"):
            labels[label] = value
    connection = of.text("ansible_connection")
    kept = of.kept()
    if connection and connection not in ("ssh", "smart", "local", "paramiko", "paramiko_ssh"):
        kept["ansible_connection"] = connection
    return Node(
        name=host.name,
        address=None if address == host.name else address,
        user=of.text("ansible_user", "ansible_ssh_user"),
        port=of.number("ansible_port", "ansible_ssh_port", least=1, most=65535),
        jump=of.jump(),
        identity=of.path("ansible_ssh_private_key_file", "ansible_private_key_file"),
        sku=of.text("ltp_sku"),
        accelerators=of.number("ltp_accelerators", least=0, most=1024),
        labels=labels,
        # "auto" and its kin let Ansible look for one.
        python="python3" if not python or python.startswith("auto") else python,
        vars=kept,
        local=connection == "local",
        origin=f"{host.file}:{host.line}" if host.line else host.file,
    )


class _Reader:
    """The variables of one host, checked as they are asked for."""

    def __init__(self, host: Host, said: Mapping[str, Any]) -> None:
        self.host, self.said = host, said

    def wrong(self, variable: str, message: str) -> DocumentError:
        return DocumentError(self.host.file, self.host.line, f"{self.host.name}.{variable}", message)

    def text(self, *names: str) -> str | None:
        """The first of `names` that is given, as text with its templates filled in."""
        for name in names:
            value = self.said.get(name)
            if value is None or value == "":
                continue
            if isinstance(value, Vaulted):
                raise self.wrong(name, "is in a vault, which is not opened here; write it in the clear")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise self.wrong(name, f"expected text, found {value!r}")
            try:
                return filled(str(value), self.said, self.host.name)
            except ValueError as error:
                raise self.wrong(name, str(error)) from None
        return None

    def number(self, *names: str, least: int, most: int) -> int | None:
        value = self.text(*names)
        if value is None:
            return None
        if not (value.isascii() and value.isdecimal() and len(value) < 10 and least <= int(value) <= most):
            name = next(name for name in names if name in self.said)
            raise self.wrong(name, f"expected a number from {least} to {most}, found {value}")
        return int(value)

    def path(self, *names: str) -> str | None:
        value = self.text(*names)
        return None if value is None else str(Path(value).expanduser())

    def jump(self) -> str | None:
        for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
            if arguments := self.text(name):
                try:
                    if jump := jump_of(arguments):
                        return jump
                except ValueError as error:
                    raise self.wrong(name, f"not what ssh takes: {error}") from None
        return None

    def labels(self) -> dict[str, str]:
        value = self.said.get("ltp_labels") or {}
        if not isinstance(value, dict) or not all(isinstance(v, str | int) for v in value.values()):
            raise self.wrong("ltp_labels", "expected a mapping of names to text")
        return {str(key): str(item) for key, item in value.items()}

    def kept(self) -> dict[str, Any]:
        """Variables that are neither Ansible's nor ours, nor secret."""
        return {
            key: _without_secrets(value)
            for key, value in self.said.items()
            if not key.startswith(("ansible_", "ltp_")) and not SECRET.search(key) and _is_plain(value)
        }


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _without_secrets(item)
            for key, item in value.items()
            if not SECRET.search(str(key)) and _is_plain(item)
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value if _is_plain(item)]
    return value


def _is_plain(value: Any) -> bool:
    """What JSON and YAML can hold alike; a vaulted value is not among it."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | dict | list | tuple)
