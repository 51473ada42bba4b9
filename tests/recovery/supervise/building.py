"""Short ways to write attempts and faults down."""

from __future__ import annotations

from typing import Any

from recovery.blame import Blame
from recovery.supervise.model import (
    Attempt,
    Ending,
    Fault,
    FleetView,
    Proof,
)

NODES = ("n1", "n2")
HOUR = 3600.0


def attempt(number: int = 0, **changes: Any) -> Attempt:
    """A failed one of two nodes, that began at `number` hours and ran for half an hour."""
    started = 1_700_000_000.0 + number * HOUR
    values: dict[str, Any] = {
        "number": number,
        "nodes": NODES,
        "started": started,
        "ended": started + HOUR / 2,
        "ending": Ending.FAILED,
    }
    return Attempt(**{**values, **changes})


def past(*reached: int | None, **changes: Any) -> list[Attempt]:
    """Attempts that reached these steps; None: none."""
    return [attempt(number, last_step=step, **changes) for number, step in enumerate(reached)]


def fault(kind: str = "rank.killed", blame: Blame = Blame.UNKNOWN, **changes: Any) -> Fault:
    return Fault(kind, blame, **{"message": "it broke", **changes})


KILLED = fault(ranks=(1,), suspects=("n2",), proof=Proof.EXIT)
BAD_NODE = fault("kernel.xid", Blame.HARDWARE, nodes=("n2",), proof=Proof.KERNEL_LOG)
PORT = fault("port.taken", Blame.PLATFORM)
BUG = fault("code.exception", Blame.USER, place="train.py:7 ValueError", proof=Proof.EXIT)
MISSING = fault("code.import", Blame.USER, place="train.py:1 ImportError", retryable=False, proof=Proof.EXIT)


def fleet(**changes: Any) -> FleetView:
    return FleetView(**{"nodes": NODES, "needed": 2, **changes})
