"""What one field of a vendor tool says: a value, nothing (the device has no such thing), or a fault."""

import re
from typing import Callable, Iterable, List, Optional, Tuple

from probes.agent.api import Measure, Scalar

_ABSENT = re.compile(
    r"^(\[?(n/?a|not supported|not available|unsupported)\]?|unknown|none|-|"
    r"requested functionality has been deprecated|)$",
    re.IGNORECASE,
)
_BROKEN = re.compile(
    r"err!|gpu is lost|unknown error|requires reset|no device|not found|timed? ?out|failed", re.IGNORECASE
)
_NUMBER = re.compile(r"^\(?([-+]?[0-9]*\.?[0-9]+)\s*([A-Za-z%/]*)(\([a-z]\))?\)?$")

_BYTES = {"b": 1, "kb": 1000, "kib": 1 << 10, "mb": 1 << 20, "mib": 1 << 20, "gb": 1 << 30, "gib": 1 << 30}
"""The tools write MB and mean MiB: the totals that they print are those of binary units."""

Row = Tuple[str, Optional[str], Callable[[str], Scalar]]
"""A metric, the field's text (None: not there), and how the text becomes a value."""


def absent(text: Optional[str]) -> bool:
    """The device does not have it: ``N/A``, ``[Not Supported]``, an empty field."""
    return text is None or bool(_ABSENT.match(text.strip()))


def broken(text: Optional[str]) -> bool:
    """The tool could not ask the device: ``ERR!``, ``GPU is lost``, ``Unknown Error``."""
    return text is not None and bool(_BROKEN.search(text))


def number(text: str) -> float:
    """``41 C`` -> 41, ``(1300Mhz)`` -> 1300, ``16x`` -> 16. Raises ValueError."""
    match = _NUMBER.match(text.strip())
    if match is None:
        raise ValueError("not a number: %r" % text[:80])
    value = float(match.group(1))
    return int(value) if value == int(value) else value


def size(text: str) -> int:
    """``10989 MiB`` -> bytes. Raises ValueError."""
    match = _NUMBER.match(text.strip())
    if match is None or (match.group(2) or "b").lower() not in _BYTES:
        raise ValueError("not a size: %r" % text[:80])
    return int(float(match.group(1)) * _BYTES[(match.group(2) or "b").lower()])


def word(text: str) -> str:
    """Lower case, without blanks around: what tools write differs in capitals from version to version."""
    return text.strip().lower()


def flag(text: str) -> int:
    """``Yes``/``Active``/``Enabled`` -> 1, their opposites -> 0. Raises ValueError."""
    meaning = {
        "yes": 1, "active": 1, "enabled": 1, "true": 1, "1": 1,
        "no": 0, "not active": 0, "disabled": 0, "inactive": 0, "false": 0, "0": 0,
    }  # fmt: skip
    if word(text) not in meaning:
        raise ValueError("neither yes nor no: %r" % text[:80])
    return meaning[word(text)]


def measures(device: Optional[str], rows: Iterable[Row]) -> List[Measure]:
    """Rows as measures: an absent field gives none, a broken one gives null, which misses every limit."""
    found = []
    for metric, text, convert in rows:
        if text is None or absent(text):
            continue
        found.append(Measure(metric, None if broken(text) else convert(text), device))
    return found
