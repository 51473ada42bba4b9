"""Which checkpoints may go: a pure rule."""

from __future__ import annotations

from collections.abc import Iterable

LEAST = 2


def expendable(good: Iterable[int], keep_last: int, keep_every: int | None) -> list[int]:
    """Versions to delete, oldest first. `good`: versions of all checkpoints that can be loaded.

    The newest `keep_last` stay, at least two, and so do multiples of `keep_every`.
    """
    versions = sorted(set(good))
    old = versions[: -max(keep_last, LEAST)]
    return [version for version in old if keep_every is None or version % keep_every]
