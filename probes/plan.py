"""Which checks run, and on which nodes they do. Pure.

A plan is one list for the whole run; :func:`for_node` says what is left out on one node, and why.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import get_args

from inventory.errors import UsageError
from probes.catalogue import Catalogue, Check, Level
from probes.model import CheckRecord, Status
from probes.profiles import Kind

LEVELS: tuple[Level, ...] = get_args(Level)
"""From the smallest to the largest; each contains the ones before it."""

IDLE_TAG = "idle"
"""Checks of a node that nobody should be using: they say nothing about one that a job has."""

OCCUPANCY_METRIC = "running"
"""Of a check with that tag: how many processes are on an accelerator."""


@dataclass(frozen=True)
class Plan:
    """The checks of one run, in the order of the catalogue."""

    level: Level
    checks: tuple[Check, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Checks of this level that were taken out by name -> by what."""
    load_in_use: bool = False
    """Told to load nodes even where somebody works on them."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks)

    @property
    def quiet(self) -> tuple[Check, ...]:
        """Checks that put no load on the machine."""
        return tuple(check for check in self.checks if not check.spec.loads)

    @property
    def loading(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.spec.loads)

    def __str__(self) -> str:
        return f"{self.level} ({len(self.checks)} checks)"


def make_plan(
    catalogue: Catalogue,
    level: Level = "quick",
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    load_in_use: bool = False,
) -> Plan:
    """The checks of `level`, reduced to those that `only` names and without those that `exclude` names.

    A name is a check's, a glob (``accelerator.*``), a family or a tag; several may stand in one text,
    separated by commas. A check named exactly is chosen whatever its level. Raises UsageError for a
    name that fits no check, and when nothing is left.
    """
    reach = LEVELS[: LEVELS.index(level) + 1]
    at_level = [check for check in catalogue if check.spec.level in reach]
    chosen = {check.name for check in at_level}
    wanted = _names(only)
    if wanted:
        fitting = {name: _fitting(catalogue, name) for name in wanted}
        chosen = {
            check.name
            for name, checks in fitting.items()
            for check in checks
            if check.name in chosen or check.name == name
        }
        for name, checks in fitting.items():
            if not chosen & {check.name for check in checks}:
                larger = min((c.spec.level for c in checks), key=LEVELS.index)
                raise UsageError(f"'{name}' fits only checks of larger plans; add --{larger}")
    excluded: dict[str, str] = {}
    for name in _names(exclude):
        for check in _fitting(catalogue, name):
            if check.name in chosen:
                excluded[check.name] = name
    left = tuple(check for check in catalogue if check.name in chosen and check.name not in excluded)
    if not left:
        raise UsageError("every check of the plan is excluded; name fewer")
    return Plan(level, left, excluded, load_in_use)


def _names(texts: Sequence[str]) -> list[str]:
    return [name for text in texts for part in text.split(",") if (name := part.strip())]


def _fitting(catalogue: Catalogue, name: str) -> list[Check]:
    found = [
        check
        for check in catalogue
        if name in (check.name, check.family) or name in check.spec.tags or fnmatchcase(check.name, name)
    ]
    if found:
        return found
    known = {check.name for check in catalogue} | {check.family for check in catalogue}
    known |= {tag for check in catalogue for tag in check.spec.tags}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else "see 'ltpctl validate list'"
    raise UsageError(f"'{name}' is no check, family, tag or glob that fits one; {advice}")


def withheld(plan: Plan, kind: Kind) -> dict[str, str]:
    """Checks of the plan that this kind of node is not asked -> why."""
    if kind.profile is None:
        return {}
    reason = f"sku:{kind.profile.name} leaves it out"
    return {check.name: reason for check in plan.checks if check.name in kind.profile.skip}


def occupancy_checks(catalogue: Catalogue) -> tuple[Check, ...]:
    """The checks that see whether somebody's processes are on the accelerators."""
    return tuple(
        check for check in catalogue if IDLE_TAG in check.spec.tags and OCCUPANCY_METRIC in check.spec.metrics
    )


def in_use(catalogue: Catalogue, records: Mapping[str, CheckRecord]) -> str:
    """Why a node must not be loaded, from what its quiet checks saw; empty if nothing speaks against it.

    A check that was carried out and failed speaks against it: somebody may be there.
    """
    devices: list[str] = []
    unseen: list[str] = []
    for check in occupancy_checks(catalogue):
        record = records.get(check.name)
        if record is None:
            continue
        if record.status in (Status.TIMEOUT, Status.ERROR):
            unseen.append(f"{check.name}: {record.detail or record.status}")
        for measure in record.measures:
            value = measure.value
            if measure.metric != OCCUPANCY_METRIC:
                continue
            if value is None:
                unseen.append(f"{check.name}: no answer for device {measure.device or '?'}")
            elif isinstance(value, int | float) and value > 0:
                devices.append(measure.device or "?")
    if devices:
        return f"the node is in use: processes are on its accelerators ({', '.join(devices)})"
    return f"the node may be in use, nobody could see ({unseen[0]})" if unseen else ""
