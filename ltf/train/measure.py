"""What all ranks know of a step when its passes are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ltf.guard import finite
from ltf.parallel.norms import Norms, gradient_norms
from ltf.parallel.world import World
from ltf.passes import Passed
from ltf.timing import OwnSeconds
from ltf.train.assembly import Model
from ltf.train.loads import fullest


@dataclass(frozen=True)
class Measured:
    """The same on all ranks, but for `counts`, which are of this rank's layers.

    `loss`: mean cross-entropy in nats a label. `balance`, `z`: mean over the MoE layers; None without any.
    `fullest`: tokens of the fullest expert relative to the mean. `own`, `reports`: by rank.
    """

    loss: float
    balance: float | None
    z: float | None
    fullest: float | None
    norms: Norms
    own: tuple[OwnSeconds, ...]
    reports: tuple[finite.Report, ...]
    counts: Mapping[int, Tensor]


def measure(
    model: Model, passed: Passed, own: OwnSeconds, report: finite.Report, world: World, *, layers: int
) -> Measured:
    """After the passes, before clipping; three collectives, of which two are of a few numbers."""
    norms = gradient_norms(model.parameters, world, layers)
    counts = model.loads.summed(passed.counts)
    load = fullest(counts)
    mine = [
        float(passed.loss),
        float(passed.balance),
        float(passed.z),
        own.seconds,
        own.rows,
        own.uneven,
        0.0 if load is None else load,
        *report.words(),
    ]
    table = world.gather(mine)
    sparse = len(model.parts[0].args.moe_layers)
    loss, balance, z = (sum(row[column] for row in table) for column in range(3))
    return Measured(
        loss=loss,
        balance=balance / sparse if sparse else None,
        z=z / sparse if sparse else None,
        fullest=max(row[6] for row in table) if sparse else None,
        norms=norms,
        own=tuple(OwnSeconds(row[3], int(row[4]), row[5]) for row in table),
        reports=tuple(finite.Report.of(row[7:]) for row in table),
        counts=counts,
    )
