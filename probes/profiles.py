"""SKU profiles: what one kind of node must show, and which kind a node is.

Limits are laid over each other: the catalogue's defaults, the SKU's, the inventory's. Each keeps its
source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from inventory.document import Document, Place, read
from inventory.errors import DocumentError, UsageError
from inventory.fleet import Node
from probes.catalogue import Catalogue, ProfileFile, read_demand
from probes.criteria import Rule, Rules, compile_rules
from probes.limits import Demand, LimitError, parse
from probes.model import CheckRecord

BUILT_IN = Path(__file__).parent / "sku"

COUNT_CHECK = "accelerator.count"
"""The check whose first metric is the number of accelerators; ``accelerators: 8`` is a limit on it."""

PCI_METRIC = "pci_id"
"""``vendor:device`` of each device, from any check of the accelerator family: how a SKU is recognised."""


@dataclass(frozen=True)
class Profile:
    """What one SKU must show."""

    name: str
    what: str
    demands: Mapping[str, Demand]
    """``family.check.metric`` -> limit, with source ``sku:NAME``."""
    aliases: tuple[str, ...] = ()
    vendor: str = ""
    pci: frozenset[str] = frozenset()
    accelerators: int = 0
    params: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    essential: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    extends: str = ""
    """Name of the profile that this one was laid over."""
    origin: str = ""


@dataclass(frozen=True)
class Profiles:
    """All known SKUs by name."""

    by_name: Mapping[str, Profile]

    def find(self, name: str) -> Profile:
        """The profile called so, or with that alias; case does not matter. UsageError if there is none."""
        wanted = name.lower()
        for profile in self.by_name.values():
            if wanted in (profile.name, *profile.aliases):
                return profile
        known = [n for p in self.by_name.values() for n in (p.name, *p.aliases)]
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(self.by_name))}"
        raise UsageError(f"no profile describes the SKU '{name}'; {advice}")

    def recognise(self, pci: Iterable[str]) -> Profile | None:
        """The only profile that has one of these ``vendor:device`` ids; None if there is none, or several."""
        ids = frozenset(pci)
        found = [profile for profile in self.by_name.values() if profile.pci & ids]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Kind:
    """As what a node is judged."""

    sku: str | None
    profile: Profile | None
    rules: Rules
    recognised: bool = True
    """False: it has accelerators that no profile describes, so that only the defaults were applied."""

    @property
    def essential(self) -> frozenset[str]:
        return self.rules.essential


def load_profiles(
    catalogue: Catalogue, extra: Iterable[Path | str] = (), built_in: Path = BUILT_IN
) -> Profiles:
    """The profiles that ship and those of `extra` (files or folders).

    A profile of the same name replaces one that ships, so that a site can correct it. Raises DocumentError
    for a mistake, with its line.
    """
    found: dict[str, Profile] = {}
    documents: dict[str, Document] = {}
    for place in (built_in, *map(Path, extra)):
        theirs: dict[str, Profile] = {}
        for path in _yaml_files(place):
            document = read(path)
            profile = _profile(document, catalogue)
            if earlier := theirs.get(profile.name):
                raise document.error(("sku",), f"'{profile.name}' is described already in {earlier.origin}")
            theirs[profile.name] = profile
            documents[profile.name] = document
        found.update(theirs)
    _refuse_shared_names(found.values())
    return Profiles({name: _with_base(name, found, documents, ()) for name in found})


def _with_base(
    name: str, own: Mapping[str, Profile], documents: Mapping[str, Document], above: tuple[str, ...]
) -> Profile:
    """The profile called `name` over the one that it extends, and that over its own; `above` led here."""
    profile = own[name]
    if not profile.extends:
        return profile
    place: Place = ("extends",)
    if profile.extends not in own:
        raise documents[name].error(place, f"no profile is called '{profile.extends}'")
    if profile.extends in (name, *above):
        raise documents[name].error(place, f"'{profile.extends}' extends this profile itself")
    base = _with_base(profile.extends, own, documents, (*above, name))
    return replace(
        profile,
        demands={**base.demands, **profile.demands},
        params={
            check: {**base.params.get(check, {}), **profile.params.get(check, {})}
            for check in {**base.params, **profile.params}
        },
        essential=base.essential | profile.essential,
        skip=base.skip | profile.skip,
    )


def _refuse_shared_names(profiles: Iterable[Profile]) -> None:
    """One name or one device for two SKUs would make the choice depend on the order of files."""
    owners: dict[str, Profile] = {}
    for profile in profiles:
        for name in (profile.name, *profile.aliases, *sorted(profile.pci)):
            other = owners.setdefault(name, profile)
            if other is not profile:
                raise UsageError(
                    f"{profile.origin}: '{name}' belongs to {other.name} already ({other.origin})"
                )


def _yaml_files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(p for p in place.iterdir() if p.suffix in (".yaml", ".yml") and p.is_file())
    if not place.exists():
        raise UsageError(f"{place}: no such file or folder of SKU profiles")
    return [place]


def _place(node: Node) -> str:
    return f"{node.origin}: {node.name}: " if node.origin else f"{node.name}: "


@dataclass
class RuleBook:
    """Rules for any node, compiled once for each kind of node."""

    catalogue: Catalogue
    profiles: Profiles
    _common: dict[tuple[str | None, int | None], Rules] = field(default_factory=dict)
    """By SKU and declared number of accelerators."""
    _compiled: dict[tuple[str | None, int | None, tuple[tuple[str, Demand], ...]], Rules] = field(
        default_factory=dict
    )
    """With the inventory's own limits over them, each of which names its line."""

    def declared(self, node: Node) -> Profile | None:
        """The profile that the inventory names; None if it names none. UsageError if it is unknown."""
        if node.sku is None:
            return None
        try:
            return self.profiles.find(node.sku)
        except UsageError as error:
            raise UsageError(f"{_place(node)}sku: {error}") from None

    def kind(self, node: Node, pci: Iterable[str] = ()) -> Kind:
        """As what `node` is judged, given the ids of the accelerators it showed."""
        ids = sorted(set(pci))
        profile = self.declared(node) or self.profiles.recognise(ids)
        sku = profile.name if profile else (f"pci:{'+'.join(ids)}" if ids else None)
        own = self._inventory_demands(node)
        key = (profile.name if profile else None, node.accelerators, tuple(own.items()))
        rules = self._compiled.get(key)
        if rules is None:
            rules = self._compiled[key] = self._compile(profile, own, node.accelerators)
        return Kind(sku, profile, rules, recognised=profile is not None or not ids)

    def check(self, nodes: Iterable[Node]) -> None:
        """Raise UsageError for the first node whose SKU, limits or parameters in the inventory are wrong."""
        for node in nodes:
            self.declared(node)
            self._inventory_demands(node)
            self._inventory_params(node)

    def params(self, node: Node, kind: Kind) -> Mapping[str, Mapping[str, object]]:
        """Check -> parameters that replace the catalogue's: the SKU's, and over them the inventory's."""
        of_sku = kind.profile.params if kind.profile else {}
        own = self._inventory_params(node)
        if not own:
            return of_sku
        return {check: {**of_sku.get(check, {}), **own.get(check, {})} for check in {**of_sku, **own}}

    def by_metric(self) -> dict[str, Rule]:
        """The catalogue's own rules by ``family.check.metric``."""
        checks = compile_rules(self.catalogue).checks.values()
        return {rule.name: rule for check in checks for rule in check.rules.values()}

    def _compile(self, profile: Profile | None, own: Mapping[str, Demand], declared: int | None) -> Rules:
        """Thousands of nodes, each with a line of its own, share all that is not of that line."""
        key = (profile.name if profile else None, declared)
        if key not in self._common:
            self._common[key] = self._compile_all(profile, declared)
        common = self._common[key]
        if not own:
            return common
        touched = {name.rpartition(".")[0] for name in own}
        part = compile_rules(
            Catalogue({name: check for name, check in self.catalogue.checks.items() if name in touched}),
            [profile.demands, own] if profile else [own],
            essential=common.essential,
        )
        return replace(
            common, checks={**common.checks, **part.checks}, essential=common.essential | part.essential
        )

    def _compile_all(self, profile: Profile | None, declared: int | None) -> Rules:
        count, expected_by = declared, "the inventory"
        if count is None and profile is not None:
            count, expected_by = profile.accelerators, f"sku:{profile.name}"
        vendor = profile.vendor if profile else ""
        return compile_rules(
            self.catalogue,
            [profile.demands] if profile else [],
            essential=profile.essential if profile else (),
            expects={"accelerator", vendor} - {""} if count else (),
            expected_by=expected_by,
        )

    def _inventory_demands(self, node: Node) -> dict[str, Demand]:
        found: dict[str, Demand] = {}
        if node.accelerators is not None and (metric := count_metric(self.catalogue)):
            found[metric] = Demand(parse(f"== {node.accelerators}"), None, "inventory", node.origin)
        limits = node.vars.get("limits")
        if limits is None:
            return found
        if not isinstance(limits, Mapping):
            raise UsageError(
                f"{_place(node)}vars.limits: expected metric names with limits, found {limits!r}"
            )
        for name, given in limits.items():
            found[str(name)] = self._inventory_demand(node, str(name), given)
        return found

    def _inventory_params(self, node: Node) -> Mapping[str, Mapping[str, object]]:
        given = node.vars.get("params")
        if given is None:
            return {}
        where = f"{_place(node)}vars.params"
        if not isinstance(given, Mapping) or not all(isinstance(v, Mapping) for v in given.values()):
            raise UsageError(f"{where}: expected checks with their parameters, found {given!r}")
        for name in given:
            try:
                self.catalogue.check(str(name))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
        return given

    def _inventory_demand(self, node: Node, name: str, given: object) -> Demand:
        where = f"{_place(node)}vars.limits.{name}"
        parts: Mapping[object, object] = given if isinstance(given, Mapping) else {"fail": given}
        if (
            not parts
            or not set(parts) <= {"fail", "warn"}
            or not all(isinstance(v, str) for v in parts.values())
        ):
            raise UsageError(
                f"{where}: expected a limit such as '>= 600', or 'fail' and 'warn' with one each"
            )
        try:
            self.catalogue.metric(name)
            fail, warn = (parse(str(parts[key])) if key in parts else None for key in ("fail", "warn"))
        except (UsageError, LimitError) as error:
            raise UsageError(f"{where}: {error}") from None
        return Demand(fail, warn, "inventory", node.origin)


def count_metric(catalogue: Catalogue) -> str | None:
    """Full name of the metric that counts accelerators."""
    check = catalogue.checks.get(COUNT_CHECK)
    return f"{COUNT_CHECK}.{next(iter(check.spec.metrics))}" if check else None


def pci_ids(records: Iterable[CheckRecord]) -> frozenset[str]:
    """The ``vendor:device`` ids of the accelerators that a node's records tell of."""
    return frozenset(
        measure.value.lower()
        for record in records
        if record.check.startswith("accelerator.")
        for measure in record.measures
        if measure.metric == PCI_METRIC and isinstance(measure.value, str)
    )


def _profile(document: Document, catalogue: Catalogue) -> Profile:
    file = document.parse(ProfileFile)
    source = f"sku:{file.sku}"
    demands: dict[str, Demand] = {}
    place: Place = ()
    if file.accelerators and (metric := count_metric(catalogue)):
        demands[metric] = Demand(parse(f"== {file.accelerators}"), None, source)
    try:
        for name, spec in file.limits.items():
            place = ("limits", name)
            catalogue.metric(name)
            demands[name] = read_demand(document, place, spec, source)
        for name in file.params:
            place = ("params", name)
            catalogue.check(name)
        for key, names in (("essential", file.essential), ("skip", file.skip)):
            for position, name in enumerate(names):
                place = (key, position)
                catalogue.check(name)
    except DocumentError:
        raise
    except UsageError as error:
        raise document.error(place, str(error)) from None
    return Profile(
        name=file.sku.lower(),
        what=file.what,
        demands=demands,
        aliases=tuple(alias.lower() for alias in file.aliases),
        vendor=file.vendor,
        pci=frozenset(one.lower().removeprefix("0x") for one in file.pci),
        accelerators=file.accelerators,
        params=file.params,
        essential=frozenset(file.essential),
        skip=frozenset(file.skip),
        extends=(file.extends or "").lower(),
        origin=document.file,
    )
