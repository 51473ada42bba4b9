"""Whose a failure is."""

from __future__ import annotations

from enum import StrEnum


class Blame(StrEnum):
    """Who must act."""

    HARDWARE = "hardware"
    USER = "user"
    PLATFORM = "platform"
    UNKNOWN = "unknown"
