"""What a guard or a watch found, with its proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Severity(StrEnum):
    """INFO: worth a line. WARNING: a person should look. ERROR: result or hardware is at stake."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """`kind`: dotted and stable, as `finite.gradient`; what reads events goes by it.

    `message`: one sentence for people with the values and limits that led to it. `ranks`: the culprits that
    the evidence proves; empty when it proves none. Whoever reports it adds their nodes and devices.
    """

    kind: str
    severity: Severity
    step: int
    message: str
    ranks: tuple[int, ...] = ()
    evidence: Mapping[str, Json] = field(default_factory=dict)
