"""What an Ansible inventory says, whichever notation it was written in."""

from __future__ import annotations

import itertools
import math
import re
import string
from dataclasses import dataclass, field
from typing import Any

from inventory.errors import DocumentError
from inventory.nodeset import MAX_NODES


class Vaulted:
    """Stands for a value that only ansible-vault can open; nothing here tries."""

    def __repr__(self) -> str:
        return "a vaulted value"


VAULTED = Vaulted()


@dataclass
class Host:
    name: str
    file: str
    line: int | None
    vars: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    hosts: dict[str, None] = field(default_factory=dict)
    children: dict[str, None] = field(default_factory=dict)
    vars: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inventory:
    """Filled by the readers of the notations; several files of one inventory fill the same."""

    hosts: dict[str, Host] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group())

    def host(self, name: str, file: str, line: int | None) -> Host:
        if name not in self.hosts and len(self.hosts) >= MAX_NODES:
            raise DocumentError(file, line, name, f"makes more than {MAX_NODES:,} hosts in all")
        return self.hosts.setdefault(name, Host(name, file, line))


_RANGE = re.compile(r"\[([0-9]{1,18}|[A-Za-z]):([0-9]{1,18}|[A-Za-z])(?::([0-9]{1,18}))?\]", re.ASCII)


def expand(text: str, file: str, line: int | None) -> tuple[list[str], int | None]:
    """Names and port of a host pattern such as ``web[01:10]-[a:c]:2222``."""
    names, port = _without_port(text)
    if port is not None and not 1 <= port <= 65535:
        raise DocumentError(file, line, text, f"a port is a number from 1 to 65535; found {port}")
    pieces: list[list[str] | range] = []
    widths: list[int] = []
    at = 0
    letters = string.ascii_letters
    for found in _RANGE.finditer(names):
        first, last, step = found[1], found[2], int(found[3] or 1)
        pieces.append([names[at : found.start()]])
        widths.append(-1)
        at = found.end()
        if step < 1:
            raise DocumentError(file, line, text, "the step of a range must be at least 1")
        if first.isdigit() != last.isdigit():
            raise DocumentError(file, line, text, f"'{found[0]}' mixes numbers and letters")
        if first.isdigit():
            if len(first) > 1 and first.startswith("0") and len(first) != len(last):
                raise DocumentError(file, line, text, f"the ends of '{found[0]}' must have the same width")
            numbers = range(int(first), int(last) + 1, step)
            widths.append(len(first) if first.startswith("0") else 0)
            pieces.append(numbers)
        else:
            pieces.append(list(letters[letters.index(first) : letters.index(last) + 1 : step]))
            widths.append(-1)
        if not pieces[-1]:
            raise DocumentError(file, line, text, f"'{found[0]}' runs backwards")
    pieces.append([names[at:]])
    widths.append(-1)
    if "[" in names[at:] or any("[" in piece[0] for piece in pieces if isinstance(piece, list)):
        raise DocumentError(file, line, text, "a range is written [01:10] or [a:f] in an Ansible inventory")
    size = math.prod(len(piece) for piece in pieces)
    if size > MAX_NODES:
        raise DocumentError(file, line, text, f"stands for {size:,} hosts; at most {MAX_NODES:,} are taken")
    texts = [
        list(piece) if isinstance(piece, list) else [str(n).zfill(width) for n in piece]
        for piece, width in zip(pieces, widths, strict=True)
    ]
    return ["".join(parts) for parts in itertools.product(*texts)], port


def _without_port(text: str) -> tuple[str, int | None]:
    """``host:2222`` apart; a colon inside brackets is a range's, and several mean an IPv6 address."""
    if found := re.fullmatch(r"\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\](?::([0-9]{1,9}))?", text):
        return found[1], None if found[2] is None else int(found[2])
    outside = re.sub(r"\[[^\]]*\]", "", text)
    found = re.fullmatch(r"(.*):([0-9]{1,9})", text)
    if found and outside.count(":") == 1:
        return found[1], int(found[2])
    return text, None
