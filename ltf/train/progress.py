"""How far a run has come: what a checkpoint holds beside its tensors, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ltf.findings import Json


@dataclass(frozen=True)
class Progress:
    """`step`: optimizer steps behind us, skipped ones included. `next_sample`: global index of the first
    sample not yet used. `tokens`: positions trained on. `skipped`: steps whose batch changed nothing.
    `roll_backs`: steps from which the run went back to a checkpoint. `watches`: state of guards and plans by
    name.
    """

    step: int = 0
    next_sample: int = 0
    tokens: int = 0
    skipped: int = 0
    roll_backs: tuple[int, ...] = ()
    watches: Mapping[str, Json] = field(default_factory=dict)

    def after_step(self, samples: int, tokens: int, *, skipped: bool) -> Progress:
        return replace(
            self,
            step=self.step + 1,
            next_sample=self.next_sample + samples,
            tokens=self.tokens + (0 if skipped else tokens),
            skipped=self.skipped + skipped,
        )

    def rolled_back_from(self, failed: Progress, samples: int) -> Progress:
        """This checkpoint's progress, but going on behind the samples that `failed` was reading."""
        return replace(
            self,
            next_sample=failed.next_sample + samples,
            roll_backs=(*failed.roll_backs, failed.step),
        )

    def to_json(self) -> dict[str, Json]:
        return {
            "step": self.step,
            "next_sample": self.next_sample,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "roll_backs": list(self.roll_backs),
            "watches": dict(self.watches),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Json]) -> Progress:
        known = {f.name for f in fields(cls)}
        if missing := sorted(known - set(found)):
            raise ValueError(f"its progress lacks {', '.join(missing)}: another version wrote it")
        values: dict[str, Any] = {name: found[name] for name in known}
        return cls(**{**values, "roll_backs": tuple(values["roll_backs"])})
