"""No inventory at all: this machine, reached without SSH."""

from __future__ import annotations

import socket

from inventory.fleet import Fleet, Node
from inventory.nodeset import NAME


def read(hostname: str | None = None) -> Fleet:
    """A fleet of one, named by the machine's host name (`hostname` replaces what the system says)."""
    name = socket.gethostname() if hostname is None else hostname
    if not NAME.fullmatch(name):
        name = "localhost"
    return Fleet.build("local", [Node(name=name, local=True, origin="this machine")], source="this machine")
