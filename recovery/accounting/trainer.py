"""From the trainer's events (docs/ltf-events.md) to entries of the journal."""

from __future__ import annotations

from collections.abc import Mapping

from recovery.accounting.entries import Entry
from recovery.accounting.journal import from_json

_KEPT = {
    "run_started": ("steps",),
    "resumed": ("step", "reason", "seconds", "checkpoint"),
    "step": ("step", "seconds", "tokens", "loss", "checkpoint_stall_seconds"),
    "checkpoint_saved": ("step", "seconds", "stall_seconds"),
}


def from_trainer(event: Mapping[str, object], time: float) -> Entry | None:
    """The entry for one event, read at `time` (the supervisor's clock); None where accounting needs none.

    Only rank 0 speaks for the run: what other ranks write gives None. Raises ValueError, naming the field,
    for an event that breaks its schema."""
    name = event.get("event")
    if not isinstance(name, str) or name not in _KEPT or event.get("rank") != 0:
        return None
    line: dict[str, object] = {
        "entry": name,
        "time": time,
        "attempt": event.get("attempt"),
        "t": event.get("t"),
    }
    # The schema writes null where a figure is not known; here it is then left at its default.
    line |= {field: event[field] for field in _KEPT[name] if event.get(field) is not None}
    return from_json(line)
