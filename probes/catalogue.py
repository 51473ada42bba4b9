"""The catalogue: every check that exists, as data.

``probes/checks/FAMILY.yaml`` and people's own files share one schema.

A built-in check names a function in ``probes/checks/FAMILY.py``; a declarative one names a command or a
file, and a parser. Both say in the same words what they measure, within which limits, why it matters and
what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inventory.document import Document, Place, kind, read
from inventory.errors import UsageError
from probes.limits import Demand, Limit, LimitError
from probes.limits import parse as parse_limit

BUILT_IN = Path(__file__).parent / "checks"

CheckName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Level = Literal["quick", "standard", "comprehensive"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSpec(Strict):
    """The healthy condition; a value that misses `fail` is a failure, one that misses `warn` a warning.

    Grammar: an operator and a value: ``== 0``, ``!= x``, ``< 5``, ``<= 5``, ``> 5``, ``>= 5``,
    ``in a, b``, ``between 1 and 5``, ``within 5% of 100``, ``matches REGEX`` (whole value), ``known`` (any
    value but null). ``probes/limits.py`` reads it.
    """

    fail: str | None = None
    warn: str | None = None
    reference: str = ""
    """Where the number comes from: a document, a standard, a measurement."""
    required: bool = True
    """In a SKU profile: whether a node must report the value. False: judged where it is reported, since some
    machines of the SKU (virtual ones, say) cannot tell it."""


class PeerSpec(Strict):
    """Comparison with the other nodes of the same SKU in the same run (and between devices of a node)."""

    rule: Literal["majority", "robust_z"]
    outcome: Literal["warn", "fail"] = "warn"
    worse: Literal["lower", "higher", "both"] = "both"
    z: float = Field(default=6.0, gt=0)
    """Deviations, in robust standard deviations (1.4826 x MAD)."""
    floor: float = Field(default=0.05, ge=0)
    """Smallest relative difference to the median that counts, however tight the peers are."""
    least: float = Field(default=0.0, ge=0)
    """Smallest difference to the median that counts, in the metric's unit."""
    siblings: bool = True
    """Whether the devices of one node are alike, so that they are compared with each other too."""
    alike: MetricName | None = None
    """Another metric of the check: only nodes that report the same value of it are compared."""


class BaselineSpec(Strict):
    """Comparison with the SKU's own history in the ledger, by distribution."""

    worse: Literal["lower", "higher"]
    similarity: float = Field(default=0.95, gt=0, lt=1)
    outcome: Literal["warn", "fail"] = "warn"


class MetricSpec(Strict):
    what: str
    unit: str = ""
    """SI or the usual: bytes, seconds, celsius, watts, "GB/s", "TFLOP/s", errors, count; empty for text."""
    limit: LimitSpec | None = None
    peers: PeerSpec | None = None
    baseline: BaselineSpec | None = None
    action: str = ""
    """What a person should do about it; falls back to the check's `fix`."""
    counter: bool = False
    """Only grows: watched as a delta while load runs."""


class ParserSpec(Strict):
    """How a declarative check turns text into measures. Runs on the node; never evaluates anything."""

    kind: Literal["number", "text", "regex", "key_value", "json", "table", "lines", "exit_status"]
    pattern: str | None = None
    """regex: groups become metrics by name; a group ``device`` names the device. One line at a time."""
    separator: str | None = None
    """key_value: between key and value (default ``=`` or ``:``). table: between columns (default: blanks)."""
    fields: dict[MetricName, str] = Field(default_factory=dict)
    """Metric -> key (key_value), dotted path (json; ``*`` walks a list), or column name (table)."""
    devices: str | None = None
    """json: dotted path of the list of devices (or mapping by id); `fields` are then relative to each.
    table: column."""
    device: str | None = None
    """json: dotted path, inside a device, of its name (default: position or key)."""
    skip: int = 0
    """table: lines before the header."""


class CheckSpec(Strict):
    what: str
    """One sentence: what it looks at."""
    why: str
    """One or two sentences: what goes wrong when it is not so."""
    fix: str
    """What to do about a failure."""
    level: Level
    """The smallest plan that contains it."""
    tags: tuple[str, ...] = ()
    timeout: float = Field(default=10.0, gt=0)
    loads: bool = False
    """Puts load on the machine: never on a node in use, runs alone, counters are watched around it."""
    essential: bool = False
    """Without an answer nothing is known about the node: `unsupported` then makes its verdict unknown."""
    needs: str = ""
    """Vendor key that must be present (``nvidia``, ``amd``, ``gaudi``, ``ascend``, ``accelerator`` for any):
    else not applicable."""
    collect: str | None = None
    """Function in the family's module, or ``MODULE.FUNCTION`` beside it."""
    command: tuple[str, ...] | None = None
    file: str | None = None
    """Path or glob; each match is a device named after the part the first ``*`` matched."""
    shell: bool = False
    """`command` is one string for ``/bin/sh -c``: only where it says so."""
    parse: ParserSpec | None = None
    params: dict[str, object] = Field(default_factory=dict)
    metrics: dict[MetricName, MetricSpec]


class CatalogueFile(Strict):
    """One YAML file of checks."""

    schema_: Literal["ltpctl/checks/1"] = Field(alias="schema")
    family: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
    what: str = ""
    checks: dict[CheckName, CheckSpec]


class ProfileFile(Strict):
    """``probes/sku/NAME.yaml``: what one SKU must show. Its limits replace those of the catalogue."""

    schema_: Literal["ltpctl/sku/1"] = Field(alias="schema")
    sku: str
    what: str
    extends: str | None = None
    """Another SKU, whose limits, params, essential checks and skips hold here too, under those given here."""
    aliases: tuple[str, ...] = ()
    vendor: str = ""
    pci: tuple[str, ...] = ()
    """``vendor:device`` IDs (hex) of the accelerator, by which a node's SKU is known when none is named."""
    accelerators: int = 0
    limits: dict[str, LimitSpec] = Field(default_factory=dict)
    """``family.check.metric`` -> limit."""
    params: dict[str, dict[str, object]] = Field(default_factory=dict)
    """``family.check`` -> parameters that replace the catalogue's."""
    essential: tuple[CheckName, ...] = ()
    skip: tuple[CheckName, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the catalogue, its limits parsed."""

    name: str
    spec: CheckSpec
    demands: Mapping[str, Demand]
    """Default limits by the metric's last name; metrics without one are absent."""
    origin: str
    """``file:line``."""
    built_in: bool = True

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Catalogue:
    """Every check that exists, in the order of families and then of their files."""

    checks: Mapping[str, Check]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks.values())

    def __len__(self) -> int:
        return len(self.checks)

    def check(self, name: str) -> Check:
        """The check called `name`; UsageError with the nearest names if there is none."""
        if found := self.checks.get(name):
            return found
        raise UsageError(f"no check is called '{name}'{_nearest(name, self.checks)}")

    def metric(self, name: str) -> tuple[Check, MetricSpec]:
        """The check and the metric of a full name ``family.check.metric``; UsageError if there is none."""
        check_name, _, metric = name.rpartition(".")
        check = self.checks.get(check_name)
        if check is not None and metric in check.spec.metrics:
            return check, check.spec.metrics[metric]
        known = [metric_name for check in self for metric_name in full_names(check)]
        raise UsageError(f"no metric is called '{name}'{_nearest(name, known)}")


def load_catalogue(extra: Iterable[Path | str] = (), built_in: Path = BUILT_IN) -> Catalogue:
    """The built-in checks and those of `extra`: YAML files, or folders of them.

    A file says by its ``schema`` whether it holds checks or an adapter. Raises DocumentError for a mistake in
    a file (with its line), and UsageError for a name that is given twice (with both places).
    """
    checks: dict[str, Check] = {}
    for path in _files([built_in]):
        _add(checks, _read_checks(read(path), built_in=True))
    for path in _files(extra):
        document = read(path)
        _add(checks, _read_extra(document))
    # Not at the top: it is made of what the agent's side knows about this catalogue.
    from probes.counters import with_counters

    return with_counters(Catalogue(checks))


def full_names(check: Check) -> list[str]:
    """``family.check.metric`` of every metric."""
    return [f"{check.name}.{metric}" for metric in check.spec.metrics]


def read_demand(document: Document, place: Place, spec: LimitSpec, source: str) -> Demand:
    """Parse the limits that stand at `place` of `document`; a wrong one is a DocumentError with its line."""
    if spec.fail is None and spec.warn is None:
        raise document.error(place, "says neither 'fail' nor 'warn'; give at least one")
    return Demand(
        fail=_read_limit(document, (*place, "fail"), spec.fail),
        warn=_read_limit(document, (*place, "warn"), spec.warn),
        source=source,
        reference=spec.reference,
        required=spec.required,
    )


def _read_limit(document: Document, place: Place, text: str | None) -> Limit | None:
    if text is None:
        return None
    try:
        return parse_limit(text)
    except LimitError as error:
        raise document.error(place, str(error)) from None


def _read_extra(document: Document) -> list[Check]:
    schema = document.data.get("schema") if isinstance(document.data, dict) else None
    if schema == "ltpctl/adapter/1":
        from probes.adapter import read_adapter

        adapted = read_adapter(document).items()
        return [_check(name, spec, document, _Adapter(name)) for name, spec in adapted]
    if schema is not None and schema != "ltpctl/checks/1":
        raise document.error(
            ("schema",), f"expected ltpctl/checks/1 or ltpctl/adapter/1, found {kind(schema)}"
        )
    return _read_checks(document, built_in=False)


def _read_checks(document: Document, built_in: bool) -> list[Check]:
    file = document.parse(CatalogueFile)
    checks = []
    for name, spec in file.checks.items():
        if name.partition(".")[0] != file.family:
            message = f"the name must start with the family of this file, '{file.family}.'"
            raise document.error(("checks", name), message)
        checks.append(_check(name, spec, document, _Own(name), built_in=built_in))
    return checks


class _Own:
    """Where the parts of a check stand in a file of checks."""

    def __init__(self, name: str) -> None:
        self.place: Place = ("checks", name)

    def limit(self, metric: str) -> Place:
        return (*self.place, "metrics", metric, "limit")


class _Adapter(_Own):
    """The same for an adapter."""

    def __init__(self, name: str) -> None:
        super().__init__(name.partition(".")[2])

    def limit(self, metric: str) -> Place:
        return (*self.place, "limits", metric)


def _check(name: str, spec: CheckSpec, document: Document, at: _Own, *, built_in: bool = False) -> Check:
    _validate_source(spec, document, at.place, built_in)
    demands = {
        metric: read_demand(document, at.limit(metric), metric_spec.limit, "default")
        for metric, metric_spec in spec.metrics.items()
        if metric_spec.limit is not None
    }
    line = document.line(at.place)
    return Check(name, spec, demands, f"{document.file}:{line}" if line else document.file, built_in)


def _validate_source(spec: CheckSpec, document: Document, place: Place, built_in: bool) -> None:
    given = [key for key in ("collect", "command", "file") if getattr(spec, key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise document.error(
            place, f"exactly one of 'collect', 'command' and 'file' is needed, found {found}"
        )
    if not spec.metrics:
        raise document.error((*place, "metrics"), "at least one metric is needed")
    if spec.collect is not None:
        if not built_in:
            raise document.error(
                (*place, "collect"),
                "only built-in checks are functions; give a 'command' or a 'file', and 'parse'",
            )
        return
    if spec.parse is None:
        raise document.error((*place, "parse"), f"this key is required beside '{given[0]}' and is missing")
    if spec.command is not None and not (spec.command and spec.command[0].strip()):
        raise document.error((*place, "command"), "expected a program and its arguments, found an empty list")
    if spec.shell and (spec.command is None or len(spec.command) != 1):
        raise document.error(
            (*place, "shell"), "needs a 'command' of exactly one text, which /bin/sh -c gets"
        )
    _validate_parser(spec, spec.parse, document, (*place, "parse"))


def _validate_parser(spec: CheckSpec, parser: ParserSpec, document: Document, place: Place) -> None:
    for metric in parser.fields:
        if metric not in spec.metrics:
            advice = _nearest(metric, spec.metrics)
            raise document.error((*place, "fields", metric), f"this metric is not under 'metrics'{advice}")
    if parser.kind != "regex":
        return
    if parser.pattern is None:
        raise document.error((*place, "pattern"), "this key is required for kind 'regex' and is missing")
    try:
        groups = re.compile(parser.pattern).groupindex
    except re.error as error:
        raise document.error((*place, "pattern"), f"is not a regular expression: {error}") from None
    named = [group for group in groups if group != "device"]
    if not named:
        raise document.error((*place, "pattern"), "needs a named group, (?P<metric>...), for each metric")
    for group in named:
        if group not in spec.metrics:
            advice = _nearest(group, spec.metrics)
            raise document.error((*place, "pattern"), f"the group '{group}' is not under 'metrics'{advice}")


def _add(checks: dict[str, Check], new: Iterable[Check]) -> None:
    for check in new:
        if earlier := checks.get(check.name):
            raise UsageError(
                f"{check.origin}: {check.name}: this check exists already at {earlier.origin}; rename one"
            )
        checks[check.name] = check


def _files(places: Iterable[Path | str]) -> list[Path]:
    """YAML files of `places`, each once; a folder stands for the files in it by name."""
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.iterdir() if p.suffix in (".yaml", ".yml") and p.is_file())
        elif place.exists():
            inside = [place]
        else:
            raise UsageError(f"{place}: no such file or folder of checks")
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
