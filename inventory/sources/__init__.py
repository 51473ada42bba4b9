"""Where an inventory may come from. Every source reads something into a :class:`Fleet`; `load` chooses it."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from inventory.document import read_text
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Fleet


class Reader(Protocol):
    """What the module of a source offers."""

    def recognises(self, path: str, text: str) -> bool:
        """Whether a file with this name and content is of this kind."""
        ...

    def read(self, path: str, text: str | None = None) -> Fleet:
        """The fleet; `text` stands for the content of `path`. Raises UsageError."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of inventory."""

    prefix: str
    title: str
    module: str

    @property
    def reader(self) -> Reader:
        return cast(Reader, importlib.import_module(f"inventory.sources.{self.module}"))


SOURCES = (
    Source("slurm", "the output of scontrol show node; without a path scontrol is asked", "slurm"),
    Source("ssh-config", "OpenSSH client configuration", "ssh_config"),
    Source("ansible", "Ansible inventory: INI, YAML, exported JSON, or a folder", "ansible"),
    Source("cluster", "cluster.yaml", "cluster_yaml"),
    Source("hosts", "a name or expression a line; - reads standard input", "hostlist"),
)
"""In the order in which an unnamed kind is looked for: the most telling first, a plain list last."""


def load(spec: str | None) -> Fleet:
    """The fleet that `spec` names: ``KIND:PATH``, a path whose kind is recognised, ``-``, or None.

    None means this machine alone, without SSH. Raises UsageError for anything wrong, DocumentError with the
    line where there is one.
    """
    if spec is None or spec == "":
        from inventory.sources.this_machine import read as read_this_machine

        return read_this_machine()
    prefix, colon, path = spec.partition(":")
    for source in SOURCES:
        if colon and prefix == source.prefix:
            return _read(source, path)
    if colon and re.fullmatch(r"[a-z][a-z-]+", prefix) and not Path(spec).exists():
        known = ", ".join(source.prefix for source in SOURCES)
        raise UsageError(f"'{spec}': no kind of inventory is called '{prefix}'; there are {known}")
    if spec == "-":
        text = _standard_input()
        return recognised("-", text).reader.read("-", text)
    file = Path(spec).expanduser()
    if file.is_dir():
        return _read(next(source for source in SOURCES if source.prefix == "ansible"), spec)
    source = recognised(str(file), read_text(file))
    return source.reader.read(str(file))


def recognised(path: str, text: str) -> Source:
    """The kind of a file, by its name and content."""
    if text.startswith("#!"):
        raise DocumentError(
            path,
            None,
            "",
            "is a program; nothing is run to get an inventory. Give what it prints, in a file or by -i -",
        )
    if not text.strip():
        raise DocumentError(path, None, "", "is empty; an inventory has at least one node")
    for source in SOURCES:
        if source.reader.recognises(path, text):
            return source
    kinds = ", ".join(f"{source.prefix}:{path}" for source in SOURCES)
    raise UsageError(f"{path}: cannot tell what kind of inventory this is; say it: {kinds}")


def _read(source: Source, path: str) -> Fleet:
    if path == "-":
        return source.reader.read("-", _standard_input())
    if path:
        return source.reader.read(str(Path(path).expanduser()))
    if source.prefix == "slurm":
        return source.reader.read("")
    if source.prefix == "ssh-config":
        return source.reader.read(str(Path("~/.ssh/config").expanduser()))
    raise UsageError(f"'{source.prefix}:' needs a path, e.g. {source.prefix}:PATH")


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DocumentError("standard input", None, "", f"is not UTF-8 text (byte {error.start})") from None
