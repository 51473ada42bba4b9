"""The catalogue: every check that exists, as data. ``probes/checks/FAMILY.yaml`` and people's own files share one schema.

A built-in check names a function in ``probes/checks/FAMILY.py``; a declarative one names a command or a
file, and a parser. Both say in the same words what they measure, within which limits, why it matters and
what to do.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

CheckName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
Level = Literal["quick", "standard", "comprehensive"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSpec(Strict):
    """The healthy condition; a value that misses `fail` is a failure, one that misses `warn` a warning.

    Grammar: an operator and a value: ``== 0``, ``!= x``, ``< 5``, ``<= 5``, ``> 5``, ``>= 5``, ``in a, b``,
    ``between 1 and 5``, ``within 5% of 100``, ``matches REGEX`` (whole value), ``known`` (any value but null).
    """

    fail: str | None = None
    warn: str | None = None
    reference: str = ""
    """Where the number comes from: a document, a standard, a measurement."""


class PeerSpec(Strict):
    """Comparison with the other nodes of the same SKU in the same run (and between devices of a node)."""

    rule: Literal["majority", "robust_z"]
    outcome: Literal["warn", "fail"] = "warn"
    worse: Literal["lower", "higher", "both"] = "both"
    z: float = 6.0
    """Deviations, in robust standard deviations (1.4826 x MAD)."""
    floor: float = 0.05
    """Smallest relative difference to the median that counts, however tight the peers are."""


class BaselineSpec(Strict):
    """Comparison with the SKU's own history in the ledger, by distribution."""

    worse: Literal["lower", "higher"]
    similarity: float = 0.95
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
    """regex: groups become metrics by their names; a group ``device`` names the device. Applied to each line."""
    separator: str | None = None
    """key_value: between key and value (default ``=`` or ``:``). table: between columns (default: blanks)."""
    fields: dict[MetricName, str] = Field(default_factory=dict)
    """Metric -> key (key_value), dotted path (json; ``*`` walks a list), or column name (table)."""
    devices: str | None = None
    """json: dotted path of the list of devices (or mapping by id); `fields` are then relative to each. table: column."""
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
    timeout: float = 10.0
    loads: bool = False
    """Puts load on the machine: never on a node in use, runs alone, counters are watched around it."""
    essential: bool = False
    """Without an answer nothing is known about the node: `unsupported` then makes its verdict unknown."""
    needs: str = ""
    """Vendor key that must be present (``nvidia``, ``amd``, ``gaudi``, ``ascend``, ``accelerator`` for any): else not applicable."""
    collect: str | None = None
    """Function in the family's module."""
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
    """``probes/sku/NAME.yaml``: what one SKU must show. Limits replace the catalogue's for the same metric."""

    schema_: Literal["ltpctl/sku/1"] = Field(alias="schema")
    sku: str
    what: str
    aliases: tuple[str, ...] = ()
    vendor: str = ""
    pci: tuple[str, ...] = ()
    """``vendor:device`` IDs (hex) of the accelerator, by which the SKU of a node without one is recognised."""
    accelerators: int = 0
    limits: dict[str, LimitSpec] = Field(default_factory=dict)
    """``family.check.metric`` -> limit."""
    params: dict[str, dict[str, object]] = Field(default_factory=dict)
    """``family.check`` -> parameters that replace the catalogue's."""
    essential: tuple[CheckName, ...] = ()
    skip: tuple[CheckName, ...] = ()
