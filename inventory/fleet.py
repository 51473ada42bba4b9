"""Nodes, groups and the fleet; choosing among them by node-set expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from inventory.errors import UsageError

MAX_NODES = 100_000
"""Largest node set that is expanded. ``n[1-5000000]`` is refused by arithmetic, before anything is built."""


@dataclass(frozen=True, slots=True)
class Bmc:
    """How to reach a node's baseboard management controller. Secrets are named, never held."""

    kind: Literal["redfish", "ipmi", "ssh"]
    address: str
    user: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    verify_tls: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. None means "not said": ssh_config and the defaults of SSH then decide."""

    name: str
    address: str | None = None
    user: str | None = None
    port: int | None = None
    jump: str | None = None
    """A node's name, or ``[user@]host[:port]``; several hops separated by commas, as in ``ssh -J``."""
    identity: str | None = None
    """Path of a private key."""
    sku: str | None = None
    accelerators: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """``rack`` and ``switch`` have meaning for placement and reports; others are free."""
    bmc: Bmc | None = None
    python: str = "python3"
    """The interpreter on the node that runs the agent (3.8 or later)."""
    vars: Mapping[str, object] = field(default_factory=dict)
    groups: frozenset[str] = frozenset()
    local: bool = False
    """This machine: reached without SSH."""
    origin: str = ""
    """Where it was declared: ``file:line`` or the name of the source."""

    @property
    def host(self) -> str:
        return self.address or self.name


@dataclass(frozen=True, slots=True)
class Selection:
    """What ``--nodes --exclude --group --state`` say; empty fields choose everything."""

    nodes: str | None = None
    exclude: str | None = None
    groups: tuple[str, ...] = ()
    states: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fleet:
    """Every node of a cluster, in natural order of names, and its groups."""

    name: str
    nodes: Mapping[str, Node]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""

    def __len__(self) -> int:
        return len(self.nodes)

    def node(self, name: str) -> Node:
        """The node called `name`; UsageError with the nearest known names if there is none."""
        raise NotImplementedError

    def select(self, selection: Selection, states: Mapping[str, str] | None = None) -> tuple[Node, ...]:
        """Nodes chosen by `selection`, in fleet order. `states` (node -> state) is needed for ``--state``.

        Raises UsageError for an unknown node or group, a bad expression, and for an empty result.
        """
        raise NotImplementedError


def fold(names: list[str] | tuple[str, ...]) -> str:
    """``node001, node002, node004`` as ``node[001-002,004]``."""
    raise NotImplementedError


def expand(expression: str) -> list[str]:
    """Node names of an expression, in order; UsageError when it is malformed or larger than MAX_NODES."""
    raise NotImplementedError


_ = UsageError
