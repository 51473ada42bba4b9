"""The micro-batches of each step, read while the step before is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count

import torch

from ltf.data.loader import Batch, Loader

Assignment = Callable[[range], Sequence[range]]


class Feed:
    """Gives this rank's part of any step.

    Steps asked for in order, with one assignment, come from reading ahead; another order (after a roll-back,
    or a new plan) begins to read anew.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.loss_tokens = 0
        """Labels that count in what was taken last."""
        self._open = ExitStack()
        self._told = 0.0
        self._next: int | None = None
        self._assignment: Assignment | None = None
        self._batches: Iterator[Batch] = iter(())

    def take(self, first_sample: int, assignment: Assignment) -> list[Batch]:
        """This rank's micro-batches, on the device, of the step whose global batch begins at `first_sample`.

        `assignment` maps the step's samples to this rank's micro-batches; pass an equal one while it is
        the same. Raises DataError where the data cannot be read.
        """
        # Equal, not the same: a bound method is another object each time that it is asked for.
        if first_sample != self._next or assignment != self._assignment:
            self._begin(first_sample, assignment)
        self._next = first_sample + self.loader.global_batch
        wanted = assignment(range(first_sample, self._next))
        batches = [next(self._batches) for _ in wanted]
        # Here, and not on the device, which may still be at the step before.
        self.loss_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
        if self.device.type == "cpu":
            return batches
        return [batch.pin_memory().to(self.device) for batch in batches]

    def stalled(self) -> float:
        """Seconds that the caller of `take` has waited for data since the last call of this."""
        total = self.loader.stall.total
        waited, self._told = total - self._told, total
        return waited

    def close(self) -> None:
        """End reading ahead."""
        self._open.close()
        self._next = None

    def _begin(self, first_sample: int, assignment: Assignment) -> None:
        self.close()
        size = self.loader.global_batch
        wanted = (
            samples
            for first in count(first_sample, size)
            for samples in assignment(range(first, first + size))
        )
        self._batches = self._open.enter_context(self.loader.reading_ahead(wanted))
        self._assignment = assignment
