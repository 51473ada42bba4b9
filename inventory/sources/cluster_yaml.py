"""``cluster.yaml``: the inventory in its own format. Every mistake is answered with file, line and field."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inventory.document import Document, Place, read_text
from inventory.document import read as read_document
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Bmc, Fleet, Node
from inventory.nodeset import MAX_NODES, Declaration, Term, declared, evaluate, fold, pattern
from inventory.sources.cluster_schema import Attributes, BmcEntry, ClusterFile


def recognises(path: str, text: str) -> bool:
    yaml_name = Path(path).suffix in (".yaml", ".yml")
    return yaml_name or re.search(r"^(nodes|cluster|defaults|groups)[ \t]*:", text, re.MULTILINE) is not None


def read(path: str, text: str | None = None) -> Fleet:
    """The fleet that a ``cluster.yaml`` declares; DocumentError for the first thing wrong with it."""
    document = read_document(path, read_text(path) if text is None else text)
    file = document.parse(ClusterFile)
    entries = _entries(document, file)
    owner = _owners(document, entries)
    groups = _Groups(document, file, owner).all()
    fleet = Fleet.build(
        file.cluster or _stem(path), _nodes(document, file, entries, groups), groups, source=path
    )
    _check_addresses(document, fleet, owner, _sharing(file, entries, groups))
    _check_jumps(document, fleet, owner)
    return fleet


@dataclass(frozen=True, slots=True)
class _Entry:
    """One key of ``nodes``."""

    place: Place
    declaration: Declaration
    names: tuple[str, ...]
    said: Attributes


def _stem(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(path).stem).strip("-.") or "cluster"


def _entries(document: Document, file: ClusterFile) -> list[_Entry]:
    if not file.nodes:
        raise document.error(("nodes",), "no node is declared; write e.g. node[001-064]: {}")
    declarations: list[tuple[Place, Declaration, Attributes]] = []
    total = 0
    for key, said in file.nodes.items():
        place: Place = ("nodes", key)
        try:
            declaration = declared(key)
        except UsageError as error:
            raise document.error(place, str(error)) from None
        total += declaration.size
        if total > MAX_NODES:
            raise document.error(place, f"makes {total:,} nodes in all; at most {MAX_NODES:,} are taken")
        declarations.append((place, declaration, said))
    return [_Entry(place, d, tuple(d.names()), said) for place, d, said in declarations]


def _owners(document: Document, entries: Iterable[_Entry]) -> dict[str, _Entry]:
    owner: dict[str, _Entry] = {}
    for entry in entries:
        if len(set(entry.names)) < len(entry.names):
            twice = [name for name, count in Counter(entry.names).items() if count > 1]
            raise document.error(entry.place, f"names {fold(twice)} twice")
        if both := [name for name in entry.names if name in owner]:
            first = owner[both[0]]
            raise document.error(
                entry.place,
                f"{fold(both)} is already declared on line {document.line(first.place)} "
                f"by '{first.declaration.text}'; a node is declared once",
            )
        owner.update(dict.fromkeys(entry.names, entry))
    return owner


class _Groups:
    """Resolves group expressions, which may name nodes and other groups."""

    def __init__(self, document: Document, file: ClusterFile, known: Mapping[str, object]) -> None:
        self.document, self.file, self.known = document, file, known
        self._done: dict[str, list[str]] = {}
        self._open: list[str] = []

    def all(self) -> dict[str, list[str]]:
        for group in self.file.groups:
            place: Place = ("groups", group)
            try:
                Term(group, (group,)).check_name(group)
            except UsageError as error:
                raise self.document.error(place, str(error)) from None
            if group in self.known:
                raise self.document.error(place, "is also the name of a node; rename the group")
        return {group: self._members(group) for group in self.file.groups}

    def _members(self, group: str) -> list[str]:
        if group in self._done:
            return self._done[group]
        if group in self._open:
            circle = " -> ".join([*self._open[self._open.index(group) :], group])
            raise self.document.error(("groups", group), f"groups contain each other: {circle}")
        self._open.append(group)
        said = self.file.groups[group].nodes
        place: Place = ("groups", group)
        if (*place, "nodes") in self.document.lines:
            place = (*place, "nodes")
        found: dict[str, None] = {}
        for i, expression in enumerate([said] if isinstance(said, str) else said or []):
            here = place if isinstance(said, str) else (*place, i)
            if expression.strip():
                found |= dict.fromkeys(self._evaluate(expression, here))
        self._open.pop()
        self._done[group] = list(found)
        return self._done[group]

    def _evaluate(self, expression: str, place: Place) -> list[str]:
        def resolve(term: Term) -> list[str]:
            explicit = term.text.startswith("@")
            names: list[str] = []
            for name in (term.without("@") if explicit else term).names():
                if name in self.known and not explicit:
                    names.append(name)
                elif name in self.file.groups:
                    names += self._members(name)
                elif name == "all":
                    names += self.known
                else:
                    near = difflib.get_close_matches(name, [*self.known, *self.file.groups], n=1)
                    advice = f"; did you mean '{near[0]}'?" if near else "; declare it under nodes"
                    what = "group" if explicit else "node or group"
                    raise UsageError(f"no {what} is called '{name}'{advice}")
            return names

        try:
            return evaluate(expression, resolve)
        except UsageError as error:
            if isinstance(error, DocumentError):
                raise
            raise self.document.error(place, str(error)) from None


def _nodes(
    document: Document, file: ClusterFile, entries: Iterable[_Entry], groups: Mapping[str, list[str]]
) -> Iterator[Node]:
    base = Path(document.file).parent
    memberships = _memberships(groups)
    for where, said in [
        (("defaults",), file.defaults),
        *((("groups", g), s) for g, s in file.groups.items()),
    ]:
        _check_unpaired(document, where, said)
    for entry in entries:
        origin = f"{document.file}:{document.line(entry.place)}"
        made: dict[tuple[str, ...], tuple[dict[str, Any], _Pairs]] = {}
        for at, name in enumerate(entry.names):
            of = memberships.get(name, ())
            if of not in made:
                said = _merged([file.defaults, *(file.groups[group] for group in of), entry.said])
                made[of] = _constant(said, base), _Pairs(document, entry, said)
            constant, pairs = made[of]
            yield Node(
                name=name,
                address=pairs.address(at, name),
                port=pairs.port(at),
                bmc=pairs.bmc(at, name, base),
                jump=_own_jump(constant["jump"], name, entry.said.jump is not None),
                origin=origin,
                **{key: value for key, value in constant.items() if key != "jump"},
            )


def _memberships(groups: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for group, members in groups.items():
        for member in members:
            found[member] = (*found.get(member, ()), group)
    return found


def _merged(layers: Iterable[Attributes]) -> Attributes:
    """Later layers win; labels and vars are joined key by key."""
    values: dict[str, Any] = {"labels": {}, "vars": {}}
    for layer in layers:
        for key in layer.model_fields_set & Attributes.model_fields.keys():
            value = getattr(layer, key)
            if key in ("labels", "vars"):
                values[key] = values[key] | value
            elif value is not None:
                values[key] = value
    return Attributes.model_construct(**values)


def _constant(said: Attributes, base: Path) -> dict[str, Any]:
    """What is equal for all nodes of an entry."""
    return {
        "user": said.user,
        "jump": said.jump,
        "identity": _beside(said.identity, base),
        "sku": said.sku,
        "accelerators": said.accelerators,
        "labels": dict(said.labels),
        "python": said.python or "python3",
        "vars": dict(said.vars),
        "local": bool(said.local),
    }


def _beside(path: str | None, base: Path) -> str | None:
    """A path in the file: ``~`` is the home of who runs this, a relative one starts at the file's folder."""
    return None if path is None else str(base.absolute() / Path(path).expanduser())


def _own_jump(jump: str | None, name: str, explicit: bool) -> str | None:
    """A jump host that is itself a node is reached by the hops before it, not through itself."""
    if jump is None or explicit:
        return jump
    hops = jump.split(",")
    return ",".join(hops[: hops.index(name)]) or None if name in hops else jump


def _check_unpaired(document: Document, where: Place, said: Attributes) -> None:
    """Ranges are paired with the names of one entry; elsewhere there is nothing to pair them with."""
    for field, value in (("address", said.address), ("port", said.port)):
        if value is not None and not pattern(value).plain:
            raise document.error(
                (*where, field), "a range of values belongs to an entry of nodes; use {name} here"
            )
    if said.bmc is not None and not pattern(_bmc_address(said.bmc)[1]).plain:
        raise document.error(
            (*where, "bmc"), "a range of values belongs to an entry of nodes; use {name} here"
        )


class _Pairs:
    """Values that go with the names of an entry one by one."""

    def __init__(self, document: Document, entry: _Entry, said: Attributes) -> None:
        self._bmc = said.bmc
        count = len(entry.names)
        shared = bool(said.shared_address)
        ports = said.port is not None and not pattern(said.port).plain
        self._addresses = _paired(document, (*entry.place, "address"), said.address, count, shared or ports)
        self._ports = _paired(document, (*entry.place, "port"), said.port, count, True)
        bmc = None if said.bmc is None else _bmc_address(said.bmc)[1]
        self._bmcs = _paired(document, (*entry.place, "bmc"), bmc, count, shared)

    def address(self, at: int, name: str) -> str | None:
        return self._addresses[at % len(self._addresses)].replace("{name}", name) if self._addresses else None

    def port(self, at: int) -> int | None:
        return int(self._ports[at % len(self._ports)]) if self._ports else None

    def bmc(self, at: int, name: str, base: Path) -> Bmc | None:
        if self._bmc is None:
            return None
        kind, _ = _bmc_address(self._bmc)
        return Bmc(
            kind=kind,
            address=self._bmcs[at % len(self._bmcs)].replace("{name}", name),
            user=self._bmc.user,
            password_env=self._bmc.password_env,
            password_file=_beside(self._bmc.password_file, base),
            verify_tls=self._bmc.verify_tls,
        )


def _bmc_address(bmc: BmcEntry) -> tuple[Any, str]:
    for kind in ("redfish", "ipmi", "ssh"):
        if (address := getattr(bmc, kind)) is not None:
            return kind, address
    raise AssertionError("the schema lets no BMC without an address through")


def _paired(document: Document, place: Place, text: str | None, count: int, one_for_all: bool) -> list[str]:
    """One value a node, or a single one for all of them (a template, or where sharing is allowed)."""
    if text is None:
        return []
    values = pattern(text)
    if values.plain and ("{name}" in text or one_for_all or count == 1):
        return [text]
    if values.size != count:
        what = "one address" if values.plain else f"{values.size:,} values"
        nodes = "one node" if count == 1 else f"{count:,} nodes"
        advice = "write a range of as many, a template with {name}, or shared_address: true"
        if not values.plain:
            advice = "a range gives each node its own, in order"
        raise document.error(place, f"'{text}' is {what} for {nodes}; {advice}")
    return values.names()


def _sharing(file: ClusterFile, entries: Iterable[_Entry], groups: Mapping[str, list[str]]) -> frozenset[str]:
    """Nodes that may have the address of another."""
    may: set[str] = set()
    for entry in entries:
        if entry.said.shared_address or (file.defaults.shared_address and entry.said.shared_address is None):
            may.update(entry.names)
    for group, said in file.groups.items():
        if said.shared_address:
            may.update(groups[group])
    return frozenset(may)


def _check_addresses(
    document: Document, fleet: Fleet, owner: Mapping[str, _Entry], sharing: frozenset[str]
) -> None:
    first: dict[tuple[object, ...], str] = {}
    for node in fleet.nodes.values():
        key = ("local",) if node.local else (node.host, node.port or 22, node.jump)
        other = first.setdefault(key, node.name)
        if other == node.name or (node.name in sharing and other in sharing):
            continue
        late, early = sorted((node.name, other), key=lambda name: document.line(owner[name].place) or 0)[::-1]
        same = "this machine" if node.local else f"the address {node.host} port {node.port or 22}"
        raise document.error(
            (*owner[late].place, "local" if node.local else "address"),
            f"{late} and {early} (line {document.line(owner[early].place)}) both have {same}; "
            "correct one, or say shared_address: true for both",
        )


def _check_jumps(document: Document, fleet: Fleet, owner: Mapping[str, _Entry]) -> None:
    checked: set[str] = set()
    for node in fleet.nodes.values():
        if node.jump in (None, "none"):
            continue
        place = (*owner[node.name].place, "jump")
        seen = [node.name]
        hop = node.jump
        while hop in fleet.nodes:
            if hop in seen:
                raise document.error(place, f"the jump hosts go in a circle: {' -> '.join([*seen, hop])}")
            seen.append(hop)
            hop = fleet.nodes[hop].jump or ""
        if node.jump not in checked:
            checked.add(node.jump)
            for one in node.jump.split(","):
                _check_hop(document, fleet, place, one)


def _check_hop(document: Document, fleet: Fleet, place: Place, hop: str) -> None:
    """A hop that is no node is a host of its own, unless it is so like a node's name as to be a slip."""
    found = re.fullmatch(r"(?:[^@\s]+@)?(?:\[[^\]\s]+\]|[^\[\]@:\s]+)(?::([0-9]{1,5}))?", hop)
    if not found or (found[1] and not 1 <= int(found[1]) <= 65535):
        raise document.error(place, f"'{hop}' is not a jump host; write a node's name or [user@]host[:port]")
    if hop in fleet.nodes or re.search(r"[@:.\[]", hop):
        return
    shape = re.sub(r"[0-9]+", "#", hop)
    like = next((n for n in fleet.nodes if "#" in shape and re.sub(r"[0-9]+", "#", n) == shape), None)
    near = difflib.get_close_matches(hop, fleet.nodes, n=1, cutoff=0.8) or ([like] if like else [])
    if near:
        raise document.error(
            place,
            f"no node is called '{hop}', but there is {near[0]}; a host outside of this file is written "
            f"{hop}.DOMAIN, USER@{hop} or {hop}:22",
        )
