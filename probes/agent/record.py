"""Records of checks as they travel: what a check gave, made safe to send, within caps."""

import json
import math
import operator
from typing import Any, Dict, Iterable, List, Optional

from probes.agent.api import Measure, Scalar, TimedOut, Unsupported

MEASURES = 4096
TEXT_LENGTH = 4000
RECORD_BYTES = 768 << 10
"""The controller refuses frames of more than 1 MiB."""


def encode(message: Dict[str, Any]) -> str:
    """One line of ASCII; NaN and infinities never get this far."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


def ended(name: str, status: str, detail: str, seconds: float = 0.0, evidence: Iterable[str] = ()) -> str:
    """The record of a check that measured nothing."""
    return encode(
        {
            "check": name,
            "status": status,
            "seconds": round(seconds, 6),
            "measures": [],
            "evidence": list(evidence),
            "detail": detail if len(detail) <= 1000 else detail[:997] + "...",
        }
    )


def answered(name: str, measures: List[List[Scalar]], seconds: float, evidence: Iterable[str]) -> str:
    text = encode(
        {
            "check": name,
            "status": "answered",
            "seconds": round(seconds, 6),
            "measures": measures,
            "evidence": list(evidence),
            "detail": "",
        }
    )
    if len(text) > RECORD_BYTES:
        return ended(
            name, "error", "gave %d KiB of measures, more than can be sent" % (len(text) >> 10), seconds
        )
    return text


def collected(measures: Iterable[Measure], evidence: List[str]) -> List[List[Scalar]]:
    """What a check yields, as ``[metric, device, value]``. A number that is not finite: null, and a note.

    Raises ValueError for too many, for none, and for what is not a Measure.
    """
    found: List[List[Scalar]] = []
    for item in measures:
        if len(found) == MEASURES:
            raise ValueError("more than %d measures" % MEASURES)
        try:
            metric, value, device = item
        except (TypeError, ValueError):
            raise ValueError("not a measure: %.100r" % (item,)) from None
        safe = scalar(metric, value)
        if safe is None and value is not None:
            evidence.append(
                "%s%s: %s is not a finite number"
                % (metric, "" if device is None else " of %s" % device, value)
            )
        found.append([str(metric), None if device is None else str(device)[:200], safe])
    if not found:
        raise ValueError("no measure at all")
    return found


def scalar(metric: str, value: Any) -> Scalar:
    if value is None or isinstance(value, (bool, str)):
        return value[:TEXT_LENGTH] if isinstance(value, str) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError("%s is a %s, not a number or a text" % (metric, type(value).__name__)) from None


def from_exception(name: str, error: BaseException, seconds: float, evidence: Iterable[str]) -> str:
    if isinstance(error, Unsupported):
        return ended(name, "unsupported", str(error), seconds, evidence)
    if isinstance(error, TimedOut):
        return ended(name, "timeout", str(error), seconds, evidence)
    if isinstance(error, MemoryError):
        return ended(
            name, "error", "ran out of the memory that a check may use" + place(error), seconds, evidence
        )
    if isinstance(error, ValueError):
        return ended(name, "error", "could not be understood: %s" % error, seconds, evidence)
    return ended(name, "error", "%s: %s%s" % (type(error).__name__, error, place(error)), seconds, evidence)


def place(error: BaseException) -> str:
    """Where in the checks (or else anywhere) it was raised."""
    at: Optional[str] = None
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if at is None or file.startswith("probes/checks/") or not at.startswith("probes/checks/"):
            at = "%s line %d" % (file, step.tb_lineno)
        step = step.tb_next
    return "" if at is None else " (%s)" % at
