"""A scenario: which nodes there are, what they are, and what is wrong with some of them."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from inventory.document import Document, Place, load, read
from inventory.errors import DocumentError, UsageError
from inventory.fleet import expand

MAX_NODES = 65_000
"""What 127.101.0.1 to 127.101.255.255 has room for, rounded down."""

_FAULTS = Path(__file__).with_name("faults.yaml")


class Behaviour(enum.StrEnum):
    """What a node does wrong below the probe agent. Everything else of a fault is data."""

    REFUSE = "refuse"
    UNRESOLVABLE = "unresolvable"
    SILENT = "silent"
    TRICKLE = "trickle"
    WRONG_HOST_KEY = "wrong_host_key"
    AUTH_REFUSED = "auth_refused"
    HANG_AFTER_AUTH = "hang_after_auth"
    HANG_IN_COMMAND = "hang_in_command"
    NO_PYTHON = "no_python"
    FORCED_COMMAND = "forced_command"
    DROP = "drop"
    KILLED = "killed"
    FLOOD = "flood"
    NOISE = "noise"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Override(_Strict):
    """One measure that a fault changes."""

    metric: str
    """Full name: ``family.check.metric``."""
    device: str | None = None
    """``CLASS[INDEX]`` of values.yaml, such as ``accelerator[3]`` or ``port[1]``; none: the node's own."""
    value: float | int | str | bool | None = None
    add: float | int | None = None
    """Instead of `value`: what is added to the healthy value."""


class FaultKind(_Strict):
    """What a node with this fault does or answers."""

    what: str
    behaviour: Behaviour | None = None
    measures: tuple[Override, ...] = ()
    scale: dict[str, float] = Field(default_factory=dict)
    """Metric -> factor on the healthy value of every device."""
    lost: int | None = None
    """Index of an accelerator that its maker's tool and torch no longer see."""
    hangs: tuple[str, ...] = ()
    """Checks that do not end within their limit."""
    absent: tuple[str, ...] = ()
    """Checks whose tool the node does not have."""
    clock_offset: float = 0.0
    """Seconds by which the node's clock is ahead."""
    delay: float = 0.0
    """Seconds that the node takes to answer, beyond the scenario's latency."""


class FaultKinds(_Strict):
    schema_: Literal["ltpctl/sim-faults/1"] = Field(alias="schema")
    kinds: dict[str, FaultKind]


class PlantedFault(_Strict):
    nodes: str
    """Node set."""
    kind: str


class ScenarioFile(_Strict):
    """The file that ``ltpctl sim start`` takes."""

    schema_: Literal["ltpctl/sim/1"] = Field(alias="schema")
    nodes: str = "node[001-016]"
    sku: str = "h100-sxm"
    skus: dict[str, str] = Field(default_factory=dict)
    """Node set -> SKU of the nodes that are not of `sku`."""
    seed: int = 1
    latency: Annotated[float, Field(ge=0, le=60)] = 0.0
    """Seconds that a healthy node takes to answer."""
    checks: tuple[str, ...] = ()
    """Files of one's own checks that the nodes shall answer too; relative to this file."""
    profiles: tuple[str, ...] = ()
    """Files of one's own SKU profiles; relative to this file."""
    faults: tuple[PlantedFault, ...] = ()


@dataclass(frozen=True)
class Scenario:
    sku_of: Mapping[str, str]
    """Node -> its SKU; the keys are the nodes, in the order in which they get their addresses."""
    faults: Mapping[str, tuple[str, ...]]
    """Node -> names of its fault kinds; sound nodes are absent."""
    seed: int = 1
    latency: float = 0.0
    checks: tuple[Path, ...] = ()
    profiles: tuple[Path, ...] = ()
    document: Document | None = field(default=None, compare=False, repr=False)
    """Where it was written, for messages about its SKUs."""

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.sku_of)


@cache
def fault_kinds() -> Mapping[str, FaultKind]:
    """Every kind that can be planted, by name."""
    return load(_FAULTS, FaultKinds).kinds


def read_scenario(path: Path) -> Scenario:
    """The scenario in a file. Raises DocumentError for a mistake, with its line."""
    document = read(path)
    return build(document.parse(ScenarioFile), document, path.absolute().parent)


def build(file: ScenarioFile, document: Document | None = None, beside: Path | None = None) -> Scenario:
    """Check names and expand node sets; `beside` is the folder that paths are relative to.

    Raises UsageError, with file and line where there is a document.
    """
    with _placed(document, ("nodes",)):
        names = expand(file.nodes)
        if not names:
            raise UsageError("a fleet needs at least one node")
        if len(names) > MAX_NODES:
            raise UsageError(f"{len(names)} nodes; at most {MAX_NODES} have addresses (127.101.0.1 and up)")
    sku_of = dict.fromkeys(names, file.sku)
    for nodes, sku in file.skus.items():
        with _placed(document, ("skus", nodes)):
            sku_of.update(dict.fromkeys(_members(nodes, sku_of, file.nodes), sku))
    faults: dict[str, tuple[str, ...]] = {}
    for index, fault in enumerate(file.faults):
        with _placed(document, ("faults", index, "kind")):
            kind = _kind(fault.kind)
        with _placed(document, ("faults", index, "nodes")):
            for node in _members(fault.nodes, sku_of, file.nodes):
                before = faults.get(node, ())
                _refuse_second_behaviour(node, fault.kind, kind, before)
                faults[node] = (*before, fault.kind)
    folder = beside or Path.cwd()
    return Scenario(
        sku_of=sku_of,
        faults=faults,
        seed=file.seed,
        latency=file.latency,
        checks=tuple(folder / name for name in file.checks),
        profiles=tuple(folder / name for name in file.profiles),
        document=document,
    )


def _members(expression: str, known: Mapping[str, object], whole: str) -> list[str]:
    found = expand(expression)
    if stranger := next((node for node in found if node not in known), None):
        raise UsageError(f"{stranger} is not one of {whole}")
    return found


def _kind(name: str) -> FaultKind:
    kinds = fault_kinds()
    if name in kinds:
        return kinds[name]
    near = difflib.get_close_matches(name, kinds, n=3, cutoff=0.6)
    advice = f"did you mean {' or '.join(near)}?" if near else "'ltpctl sim faults' lists them"
    raise UsageError(f"there is no fault '{name}'; {advice}")


def _refuse_second_behaviour(node: str, name: str, kind: FaultKind, before: tuple[str, ...]) -> None:
    if kind.behaviour is None:
        return
    for other in before:
        if fault_kinds()[other].behaviour is not None:
            raise UsageError(f"{node} has the fault {other} already, which hides {name}; plant one of them")


class _placed:
    """Adds file and line to the UsageErrors of its block."""

    def __init__(self, document: Document | None, place: Place) -> None:
        self._document, self._place = document, place

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UsageError) and not isinstance(error, DocumentError) and self._document:
            raise self._document.error(self._place, str(error)) from None


def parse_planted(texts: Iterable[str]) -> tuple[PlantedFault, ...]:
    """``SET=KIND`` each, as on the command line. Raises UsageError."""
    planted = []
    for text in texts:
        where, found, kind = text.rpartition("=")
        if not found or not where.strip() or not kind.strip():
            raise UsageError(f"--fault {text!r}: expected SET=KIND, such as node017=ecc_uncorrectable")
        planted.append(PlantedFault(nodes=where.strip(), kind=kind.strip()))
    return tuple(planted)
