"""OpenSSH's client configuration: every concrete name on a ``Host`` line is a node.

Sections apply as in OpenSSH: in the order of the file, the first value found for a keyword wins, patterns
and ``Include`` too. ``Match`` is followed for ``all``, ``host`` and ``originalhost``; a section with any
other condition is left out, and ``Match exec`` is never run.
"""

from __future__ import annotations

import fnmatch
import getpass
import glob
import heapq
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from inventory.document import read_text
from inventory.errors import DocumentError
from inventory.fleet import Fleet, Node
from inventory.nodeset import NAME

INCLUDE_DEPTH = 16
"""OpenSSH's own limit of Include inside Include."""


def recognises(path: str, text: str) -> bool:
    return re.search(r"^\s*(Host|Match)(\s+|\s*=\s*)\S", text, re.MULTILINE | re.IGNORECASE) is not None


def read(path: str, text: str | None = None) -> Fleet:
    """The fleet of an ssh_config; names that lead to one machine make one node, the rest its ``aliases``."""
    directives = list(_directives(path, text, (), 0, Path(path).expanduser().parent))
    index = _Index(directives)
    nodes: dict[tuple[object, ...], Node] = {}
    aliases: dict[tuple[object, ...], list[str]] = {}
    declared: set[str] = set()
    for directive in directives:
        for name in directive.words if directive.keyword == "host" else ():
            concrete = not any(char in "*?!" for char in name)
            if name in declared or not concrete or not all(c.holds(name, name) for c in directive.under):
                continue
            if not NAME.fullmatch(name):
                raise DocumentError(directive.file, directive.line, "Host", f"'{name}' is not a usable name")
            declared.add(name)
            node = _node(name, directive, index.about(name))
            key = (node.host, node.port, node.user, node.jump)
            if nodes.setdefault(key, node) is not node:
                aliases.setdefault(key, []).append(name)
    if not nodes:
        raise DocumentError(path, None, "", "no Host line names a machine (patterns alone declare none)")
    named = [replace(n, vars={"aliases": aliases[key]}) if key in aliases else n for key, n in nodes.items()]
    return Fleet.build("ssh", named, source=path)


@dataclass(frozen=True, slots=True)
class _Condition:
    """One ``Host`` or ``Match`` line above a directive."""

    kind: str
    patterns: tuple[str, ...]

    def holds(self, name: str, host: str) -> bool:
        match self.kind:
            case "all":
                return True
            case "host":
                return _matches(name, self.patterns)
            case "hostname":
                return _matches(host, self.patterns)
            case _:
                return False


@dataclass(frozen=True, slots=True)
class _Directive:
    file: str
    line: int
    keyword: str
    words: tuple[str, ...]
    under: tuple[_Condition, ...]


class _Index:
    """Finds the directives that may concern a name without trying all of them for every name."""

    def __init__(self, directives: list[_Directive]) -> None:
        self._directives = directives
        self._by_name: dict[str, list[int]] = {}
        self._general: list[int] = []
        for at, directive in enumerate(directives):
            if directive.keyword == "host" or not directive.words:
                continue
            first = directive.under[0] if directive.under else None
            if first and first.kind == "host" and not any(c in p for p in first.patterns for c in "*?!"):
                for name in first.patterns:
                    self._by_name.setdefault(name.lower(), []).append(at)
            else:
                self._general.append(at)

    def about(self, name: str) -> Iterator[_Directive]:
        """In the order of the file."""
        for at in heapq.merge(self._general, self._by_name.get(name.lower(), [])):
            yield self._directives[at]


def _directives(
    path: str, text: str | None, outer: tuple[_Condition, ...], depth: int, base: Path
) -> Iterator[_Directive]:
    file = str(Path(path).expanduser())
    text = read_text(file) if text is None else text
    under = outer
    for number, raw in enumerate(text.splitlines(), start=1):
        found = re.fullmatch(r"\s*([A-Za-z0-9]+)(?:\s*=\s*|\s+)(.*?)\s*", raw)
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        if not found:
            raise DocumentError(file, number, "", f"'{raw.strip()}' is not 'Keyword value'")
        keyword = found[1].lower()
        words = _words(file, number, found[2])
        directive = _Directive(file, number, keyword, words, under)
        if keyword == "host":
            under = (*outer, _Condition("host", words))
            yield replace(directive, under=outer)
        elif keyword == "match":
            under = (*outer, *_match_conditions(words))
        elif keyword == "include":
            yield from _included(directive, depth, base)
        else:
            yield directive


def _included(directive: _Directive, depth: int, base: Path) -> Iterator[_Directive]:
    if depth >= INCLUDE_DEPTH:
        message = f"more than {INCLUDE_DEPTH} files include each other"
        raise DocumentError(directive.file, directive.line, "Include", message)
    for word in directive.words:
        for found in sorted(glob.glob(str(base / Path(word).expanduser()))):
            if Path(found).is_file():
                yield from _directives(found, None, directive.under, depth + 1, base)


def _words(file: str, number: int, value: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(value, comments=True))
    except ValueError as error:
        raise DocumentError(file, number, "", f"{str(error).lower()}: {value}") from None


def _match_conditions(words: tuple[str, ...]) -> tuple[_Condition, ...]:
    conditions: list[_Condition] = []
    rest = list(words)
    while rest:
        kind = rest.pop(0).lower()
        if kind == "all":
            conditions.append(_Condition("all", ()))
        elif kind in ("host", "originalhost") and rest:
            patterns = tuple(rest.pop(0).split(","))
            conditions.append(_Condition("host" if kind == "originalhost" else "hostname", patterns))
        else:
            return (_Condition("never", ()),)
    return tuple(conditions)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """OpenSSH's pattern lists: at least one matches, and none of those with ``!``."""
    lowered = name.lower()
    if any(p.startswith("!") and fnmatch.fnmatchcase(lowered, _glob(p[1:])) for p in patterns):
        return False
    return any(not p.startswith("!") and fnmatch.fnmatchcase(lowered, _glob(p)) for p in patterns)


def _glob(pattern: str) -> str:
    return pattern.lower().replace("[", "[[]")


def _node(name: str, declared: _Directive, directives: Iterable[_Directive]) -> Node:
    said: dict[str, str] = {}
    where: dict[str, _Directive] = {}
    for one in directives:
        host = said.get("hostname", name)
        if one.keyword not in said and all(condition.holds(name, host) for condition in one.under):
            said[one.keyword] = " ".join(one.words) if one.keyword == "proxycommand" else one.words[0]
            where[one.keyword] = one
    port = None
    if "port" in said:
        if not (said["port"].isascii() and said["port"].isdecimal() and 1 <= int(said["port"]) <= 65535):
            place = where["port"]
            message = f"a port is a number from 1 to 65535; found {said['port']}"
            raise DocumentError(place.file, place.line, "Port", message)
        port = int(said["port"])
    address = said.get("hostname", "").replace("%h", name).replace("%%", "%") or None
    user = said.get("user")
    jump = said.get("proxyjump")
    identity = said.get("identityfile")
    return Node(
        name=name,
        address=None if address == name else address,
        user=user,
        port=port,
        jump="none" if jump is not None and jump.lower() == "none" else jump,
        identity=_key_path(identity, name, address or name, user, port) if identity else None,
        origin=f"{declared.file}:{declared.line}",
    )


def _key_path(text: str, name: str, host: str, user: str | None, port: int | None) -> str | None:
    """IdentityFile with ssh_config's tokens filled in."""
    if text.lower() == "none":
        return None
    local = getpass.getuser()
    tokens = {
        "%%": "%",
        "%d": str(Path.home()),
        "%h": host,
        "%n": name,
        "%p": str(port or 22),
        "%r": user or local,
        "%u": local,
    }
    filled = re.sub(r"%[%dhnpru]", lambda found: tokens[found[0]], text)
    return str(Path(filled).expanduser())
