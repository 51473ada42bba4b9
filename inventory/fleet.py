"""Nodes, groups and the fleet; choosing among them by node-set expression."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from inventory.errors import UsageError
from inventory.lifecycle import State, parse
from inventory.nodeset import MAX_NODES, NAME, Term, evaluate, expand, fold, natural

__all__ = ["MAX_NODES", "Bmc", "Fleet", "Node", "Selection", "expand", "fold"]


class NothingInState(UsageError):
    """Everything was asked rightly, and no node is in the states that were asked for."""


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
    """A node's name, or ``[user@]host[:port]``; several hops separated by commas, as in ``ssh -J``.
    ``none``: directly, whatever ssh_config says."""
    identity: str | None = None
    """Path of a private key."""
    sku: str | None = None
    accelerators: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """``rack`` and ``switch`` have meaning for placement and reports; others are free."""
    bmc: Bmc | None = None
    python: str = "python3"
    """The interpreter on the node that runs the agent (3.8 or later)."""
    vars: Mapping[str, object] = field(default_factory=dict, hash=False)
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

    @classmethod
    def build(
        cls,
        name: str,
        nodes: Iterable[Node],
        groups: Mapping[str, Iterable[str]] | None = None,
        source: str = "",
    ) -> Fleet:
        """Put nodes and groups in order and tell every node its groups.

        Raises UsageError for what no source may hold: no node at all, a name that no tool could use, a
        group named as a node, a member that is not a node. Sources that know the line check it before.
        """
        where = source or name
        ordered = sorted(nodes, key=lambda node: natural(node.name))
        if not ordered:
            raise UsageError(f"{where}: no node is declared")
        position = {node.name: at for at, node in enumerate(ordered)}
        if len(position) < len(ordered):
            twice = [name for name, count in Counter(node.name for node in ordered).items() if count > 1]
            raise UsageError(f"{where}: declared twice: {fold(twice)}")
        if len(ordered) > MAX_NODES:
            raise UsageError(f"{where}: {len(ordered):,} nodes; at most {MAX_NODES:,} are taken")
        member_of: dict[str, set[str]] = {}
        members: dict[str, tuple[str, ...]] = {}
        for group in sorted(groups or {}, key=natural):
            listed = set((groups or {})[group])
            if group in position:
                raise UsageError(f"{where}: '{group}' is the name of a group and of a node; rename one")
            if strangers := listed - position.keys():
                shown = fold(sorted(strangers))
                raise UsageError(f"{where}: group {group} holds {shown}, which the inventory does not have")
            for member in listed:
                member_of.setdefault(member, set()).add(group)
            members[group] = tuple(sorted(listed, key=position.__getitem__))
        for called in [*position, *members]:
            if not NAME.fullmatch(called):
                raise UsageError(
                    f"{where}: '{called}' cannot be the name of a node or group; "
                    "names are letters, digits and '_', then also '-', '.' and ':'"
                )
        _refuse_unusable(ordered, where)
        none: frozenset[str] = frozenset()
        complete = (replace(node, groups=frozenset(member_of.get(node.name, none))) for node in ordered)
        return cls(name, {node.name: node for node in complete}, members, source)

    def __len__(self) -> int:
        return len(self.nodes)

    def node(self, name: str) -> Node:
        """The node called `name`; UsageError with the nearest known names if there is none."""
        found = self.nodes.get(name)
        if found is None:
            raise UsageError(f"no node is called '{name}'{self._nearest(name, self.nodes)}")
        return found

    def select(self, selection: Selection, states: Mapping[str, str] | None = None) -> tuple[Node, ...]:
        """Nodes chosen by `selection`, in fleet order. `states` (node -> state) is needed for ``--state``;
        a node that is not among them is new.

        Raises UsageError for an unknown node or group, a bad expression, and for an empty result; where it is
        only that no node is in these states today, NothingInState.
        """
        chosen = list(self.nodes)
        so_far = "the inventory"
        if selection.nodes is not None:
            wanted = set(self.names(selection.nodes, "--nodes"))
            chosen = [name for name in chosen if name in wanted]
            _not_empty(chosen, f"--nodes '{selection.nodes}' chooses no node of {so_far}")
            so_far = f"--nodes '{selection.nodes}'"
        if selection.groups:
            wanted = {name for group in selection.groups for name in self._group(group, "--group")}
            chosen = [name for name in chosen if name in wanted]
            option = " ".join(f"--group {group}" for group in selection.groups)
            _not_empty(chosen, f"{option} leaves none of the nodes of {so_far}")
            so_far = f"{so_far} and {option}" if selection.nodes is not None else option
        if selection.exclude is not None:
            unwanted = set(self.names(selection.exclude, "--exclude"))
            before = len(chosen)
            chosen = [name for name in chosen if name not in unwanted]
            _not_empty(chosen, f"--exclude '{selection.exclude}' takes away all {before} nodes of {so_far}")
        if selection.states:
            if states is None:
                raise ValueError("a selection by state needs the states")
            for state in selection.states:
                parse(state)
            present = Counter(states.get(name, State.NEW) for name in chosen)
            chosen = [name for name in chosen if states.get(name, State.NEW) in selection.states]
            seen = ", ".join(f"{count} {state}" for state, count in present.most_common())
            option = " ".join(f"--state {state}" for state in sorted(selection.states))
            if not chosen:
                raise NothingInState(f"{option} leaves none of the nodes chosen so far, which are: {seen}")
        return tuple(self.nodes[name] for name in chosen)

    def names(self, expression: str, option: str = "") -> list[str]:
        """Names of nodes for an expression of nodes, groups (``rack1`` or ``@rack1``), ``all`` and wildcards.

        Raises UsageError that starts with `option` for what is unknown or malformed.
        """
        try:
            return evaluate(expression, self._resolve)
        except UsageError as error:
            raise UsageError(f"{option}: {error}" if option else str(error)) from None

    def _resolve(self, term: Term) -> list[str]:
        if term.text.startswith("@"):
            return [n for group in term.without("@").names() for n in self._group(group)]
        if term.plain and any(char in "*?" for char in term.text):
            found = fnmatch.filter(self.nodes, term.text)
            found += [n for group in fnmatch.filter(self.groups, term.text) for n in self.groups[group]]
            if not found:
                raise UsageError(f"no node or group matches '{term.text}'")
            return found
        names: list[str] = []
        for name in term.names():
            if name in self.nodes:
                names.append(name)
            elif name in self.groups or name == "all":
                names += self._group(name)
            else:
                near = self._nearest(name, [*self.nodes, *self.groups])
                raise UsageError(f"no node or group is called '{name}'{near}")
        return names

    def _group(self, name: str, option: str = "") -> Iterable[str]:
        if name in self.groups:
            return self.groups[name]
        if name in ("all", "*"):
            return self.nodes
        start = f"{option}: " if option else ""
        raise UsageError(f"{start}no group is called '{name}'{self._nearest(name, self.groups)}")

    def _nearest(self, name: str, known: Iterable[str]) -> str:
        """The end of an error about an unknown name: what is near it, else what there is."""
        known = list(known)
        if near := difflib.get_close_matches(name, known[:20_000], n=3):
            return f"; near it: {', '.join(near)}"
        if not known:
            return "; the inventory has none"
        shown = fold(known)
        return f"; known: {shown}" if len(shown) <= 120 else f"; {len(known)} are known, e.g. {known[0]}"


def _refuse_unusable(nodes: Iterable[Node], where: str) -> None:
    """Values that a program on the way could take for an option, or for two words."""
    fine: set[str | None] = {None}
    for node in nodes:
        for what in ("address", "user", "jump", "sku", "python"):
            value = getattr(node, what)
            if value in fine:
                continue
            wrong = "begins with '-'" if value.startswith("-") else "is not one word"
            if value.startswith("-") or not value or not value.isprintable() or " " in value:
                raise UsageError(f"{node.origin or where}: {node.name}.{what}: {value!r} {wrong}")
            fine.add(value)


def _not_empty(chosen: list[str], message: str) -> None:
    if not chosen:
        raise UsageError(message)
