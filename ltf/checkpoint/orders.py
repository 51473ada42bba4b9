"""What rank 0 tells every saver thread to do, in one order that all of them follow."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from enum import StrEnum

from torch._C._distributed_c10d import Store  # torch.distributed has it, untyped
from torch.distributed import DistStoreError

# torch's stores take no wait without an end, and in milliseconds it must fit 32 bits.
WAIT = timedelta(days=1)


class Kind(StrEnum):
    SAVE = "save"
    """The state that every main thread has asked to keep (`clock`)."""
    SKIP = "skip"
    """That state is not saved: the save before is still being written."""
    HOLD = "hold"
    """Agree on a state, save it, go on."""
    STOP = "stop"
    """Agree on a state, save it, end."""
    GIVE_UP = "give_up"
    """Agree on a state and go no further; nothing is saved."""
    CLOSE = "close"


class Demand(StrEnum):
    """What any rank may ask of rank 0."""

    TERMINATE = "terminate"
    SAVE = "save"


@dataclass(frozen=True)
class Order:
    kind: Kind
    clock: int = 0
    reason: str = ""
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))


class Orders:
    """Each thread has an object of its own: a wait blocks the connection that it uses."""

    def __init__(self, store: Store) -> None:
        self._store = store.clone()  # type: ignore[attr-defined]
        self._posted = 0
        self._read = 0

    def post(self, order: Order) -> None:
        """Rank 0 alone."""
        self._store.set(f"order/{self._posted}", json.dumps(asdict(order)))
        self._posted += 1

    def next(self) -> Order:
        """Wait for the next one. RuntimeError if the store is gone."""
        key = f"order/{self._read}"
        deadline = time.monotonic() + WAIT.total_seconds()
        while True:
            try:
                self._store.wait([key], WAIT)
                break
            except DistStoreError:
                if time.monotonic() < deadline:
                    raise
                deadline = time.monotonic() + WAIT.total_seconds()
        found = json.loads(self._store.get(key))
        self._read += 1
        return Order(Kind(found["kind"]), found["clock"], found["reason"], found["nonce"])

    def demand(self, what: Demand, clock: int, reason: str) -> None:
        """Any rank: ask for a save of its state at `clock` or a later one."""
        self._store.set(f"demand/{what}", json.dumps([clock, reason]))
        self._store.add(f"demands/{what}", 1)

    def demands(self, what: Demand) -> tuple[int, int, str]:
        """How many there were, and the last one's clock and reason."""
        count = self._store.add(f"demands/{what}", 0)
        if not count:
            return 0, 0, ""
        clock, reason = json.loads(self._store.get(f"demand/{what}"))
        return count, clock, reason
