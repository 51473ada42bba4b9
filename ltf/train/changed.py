"""What a run's configuration says otherwise than when the checkpoint was made that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ltf.findings import Finding, Json, Severity

# By these alone it is settled which sample has which number (see `ltf.data.dataset`).
ORDER = (
    ("run", "seed"),
    ("data", "sources"),
    ("data", "seq_len"),
    ("data", "packing"),
)
# These change what a step is; samples go on where they were.
STEP = (("batch", "samples"), ("data", "mask_boundaries"))


def changes(saved: Mapping[str, Any], present: Mapping[str, Any], step: int) -> list[Finding]:
    """One warning of all changes that make this another run than the one that was begun; pure.

    Both configurations are plain JSON. A setting that the older one does not know is not compared. Where data
    lies is none of it: files may have moved.
    """
    order, other = _differing(saved, present, ORDER), _differing(saved, present, STEP)
    if not order and not other:
        return []
    changed = {**order, **other}
    told = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in changed.items())
    effect = (
        "samples are numbered anew, so that some are read again and others never"
        if order
        else "samples go on where they were"
    )
    evidence: dict[str, Json] = {name: [str(was), str(now)] for name, (was, now) in changed.items()}
    message = f"the configuration has changed since step {step} was saved: {told}; from here on {effect}"
    return [Finding("run.changed", Severity.WARNING, step, message, evidence=evidence)]


def _differing(
    saved: Mapping[str, Any], present: Mapping[str, Any], names: Sequence[tuple[str, str]]
) -> dict[str, tuple[Any, Any]]:
    found = {}
    for section, name in names:
        if name in saved.get(section, {}):
            was, now = (_comparable(name, config[section][name]) for config in (saved, present))
            if was != now:
                found[f"{section}.{name}"] = (was, now)
    return found


def _comparable(name: str, value: Any) -> Any:
    """Of a source, its file's name and not its folder."""
    if name != "sources":
        return value
    return [{**source, "prefix": str(source["prefix"]).rpartition("/")[2]} for source in value]
