"""Plain lists: a name or node-set expression a line, as ``user@node[01-16]:2222``, with ``#`` comments.

``slots=N`` after the name, as in the host files of MPI and DeepSpeed, gives the number of accelerators.
"""

from __future__ import annotations

import re
from pathlib import Path

from inventory.document import read_text
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Fleet, Node
from inventory.nodeset import MAX_NODES, declared

_LINE = re.compile(
    r"""(?:(?P<user>[^@\s-][^@\s]*)@)?
        (?: \[(?P<ipv6>[0-9A-Fa-f:.]*:[0-9A-Fa-f:.%\w]*)\]
          | (?P<names>[^@\s:]+)
          | (?P<bare6>[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%\w+)?)
        )
        (?::(?P<port>[0-9]+))?""",
    re.VERBOSE,
)


def recognises(path: str, text: str) -> bool:
    return Path(path).suffix not in (".json", ".toml", ".xml")


def read(path: str, text: str | None = None) -> Fleet:
    """The fleet that a list of hosts declares; DocumentError for the first line that is wrong."""
    text = read_text(path) if text is None else text
    nodes: dict[str, Node] = {}
    lines: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        for node in _nodes(path, number, line, room=MAX_NODES - len(nodes)):
            if node.name in nodes:
                first = lines[node.name]
                raise DocumentError(path, number, node.name, f"is already listed on line {first}; keep one")
            nodes[node.name] = node
            lines[node.name] = number
    name = "hosts" if path == "-" else re.sub(r"[^A-Za-z0-9_.-]", "_", Path(path).stem).strip("-.") or "hosts"
    return Fleet.build(name, nodes.values(), source="standard input" if path == "-" else path)


def _nodes(path: str, number: int, line: str, room: int) -> list[Node]:
    target, *rest = re.split(r"\s+(?![^\[]*\])", line)
    accelerators = None
    for word in rest:
        if not (found := re.fullmatch(r"slots=([0-9]{1,4})", word)):
            message = "one name or expression a line: [user@]node[01-16][:port], then slots=N if you like"
            raise DocumentError(path, number, "", f"'{word}' is not understood; {message}")
        accelerators = int(found[1])
    found = _LINE.fullmatch(target)
    if not found:
        raise DocumentError(path, number, "", f"'{target}' is not [user@]node[01-16][:port]")
    port = None if found["port"] is None else int(found["port"])
    if port is not None and not 1 <= port <= 65535:
        raise DocumentError(path, number, target, f"a port is a number from 1 to 65535; found {port}")
    if single := found["ipv6"] or found["bare6"]:
        names = [single.partition("%")[0]]
        address = single if "%" in single else None
        if names[0].startswith(":"):
            address, names = single, [f"0{names[0]}"]
    else:
        names, address = _expand(path, number, found["names"], room), None
    return [
        Node(name, address, found["user"], port, accelerators=accelerators, origin=f"{path}:{number}")
        for name in names
    ]


def _expand(path: str, number: int, expression: str, room: int) -> list[str]:
    try:
        declaration = declared(expression)
    except UsageError as error:
        raise DocumentError(path, number, "", str(error)) from None
    if declaration.size > room:
        message = f"makes more than {MAX_NODES:,} nodes in all; that is the most that is taken"
        raise DocumentError(path, number, expression, message)
    names = declaration.names()
    if len(set(names)) < len(names):
        raise DocumentError(path, number, expression, "names a node twice")
    return names
