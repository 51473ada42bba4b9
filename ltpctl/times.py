"""Times as a person reads them."""

from __future__ import annotations

from datetime import UTC, datetime


def shown(seconds: float | None) -> str:
    """Unix time as ``2026-01-02 03:04:05Z``; ``-`` for None."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def rfc3339(seconds: float | None) -> str | None:
    """Unix time for programs: ``2026-01-02T03:04:05.678Z``."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """``4.2 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
