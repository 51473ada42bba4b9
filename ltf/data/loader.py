"""Batches of tensors, read ahead of the step that needs them.

The state of a run's data is one number, the next global sample index; whoever asks for a batch says which
samples it wants. Reading ahead happens in a thread: it has no signals to ignore, and it dies with the
process. What it does (copying from mapped memory, waiting for the disk) leaves Python's lock to the training
thread.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ltf.data.dataset import Dataset
from ltf.data.errors import DataError
from ltf.data.order import micro_batches, samples_of_step, share_of_rank
from ltf.data.packing import Sample


@dataclass(frozen=True)
class Batch:
    """int64 tensors of shape (samples, seq_len); see ``packing.Sample``. ``samples`` are the global
    indices."""

    samples: tuple[int, ...]
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    document_ids: torch.Tensor
    position_ids: torch.Tensor

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a copy to a device need not be waited for."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            self.samples,
            change(self.tokens),
            change(self.labels),
            change(self.loss_mask),
            change(self.document_ids),
            change(self.position_ids),
        )


@dataclass
class Stall:
    """How long the caller waited for data, in seconds: in all, for the last batch, and the longest wait."""

    total: float = 0.0
    last: float = 0.0
    longest: float = 0.0
    batches: int = 0

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.last = seconds
        self.longest = max(self.longest, seconds)
        self.batches += 1


class Loader:
    """Gives batches of a dataset; ``stall`` tells what they cost the caller.

    ``clock`` gives seconds from any start.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch: int,
        micro_batch: int,
        ahead: int = 4,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("global batch", global_batch), ("micro-batch", micro_batch), ("ahead", ahead)):
            if value < 1:
                raise DataError(f"{name} of {value}: expected at least 1")
        self.dataset, self.global_batch, self.micro_batch = dataset, global_batch, micro_batch
        self.stall = Stall()
        self._ahead, self._clock = ahead, clock

    def plan(self, first_sample: int, rank: int, world: int) -> list[range]:
        """A rank's micro-batches of the step whose global batch begins with ``first_sample``."""
        step = range(first_sample, first_sample + self.global_batch)
        return micro_batches(share_of_rank(step, rank, world), self.micro_batch)

    def batch(self, step: int, rank: int, world: int, micro_batch: int) -> Batch:
        """The ``micro_batch``-th of a rank's micro-batches in a step, both counted from 0."""
        first = samples_of_step(step, self.global_batch).start
        return self.read(self.plan(first, rank, world)[micro_batch])

    def read(self, samples: Sequence[int]) -> Batch:
        """Any samples, by global index, read while the caller waits."""
        began = self._clock()
        batch = self._make(samples)
        self.stall.add(self._clock() - began)
        return batch

    @contextmanager
    def reading_ahead(self, wanted: Iterable[Sequence[int]]) -> Iterator[Iterator[Batch]]:
        """The batches of ``wanted``, in order, of which up to ``ahead`` are read before they are asked for.

        ``wanted`` is taken from as reading goes on, in the reading thread. What goes wrong there is raised
        where the batch would have come. Leaving the context ends the thread.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self._ahead)
        stopped = threading.Event()
        thread = threading.Thread(target=self._fill, args=(wanted, ready, stopped), name="data", daemon=True)
        thread.start()
        try:
            yield self._taken(ready)
        finally:
            stopped.set()
            while thread.is_alive():
                with _ignoring_empty():
                    ready.get(timeout=0.05)
            thread.join()

    def steps(self, first_sample: int, rank: int, world: int) -> Iterator[range]:
        """A rank's micro-batches without end, from a global sample index on; for ``reading_ahead``.

        A batch that does not divide among ``world`` ranks is refused here, not when the first one is read.
        """
        self.plan(first_sample, rank, world)
        steps = itertools.count(first_sample, self.global_batch)
        return itertools.chain.from_iterable(self.plan(first, rank, world) for first in steps)

    def _taken(self, ready: queue.Queue[Batch | BaseException | None]) -> Iterator[Batch]:
        while True:
            began = self._clock()
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self.stall.add(self._clock() - began)
            yield item

    def _fill(
        self,
        wanted: Iterable[Sequence[int]],
        ready: queue.Queue[Batch | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        last: BaseException | None = None
        try:
            for samples in wanted:
                if stopped.is_set():
                    return
                ready.put(self._make(samples))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that asked, which raises it
            last = error
        if not stopped.is_set():
            ready.put(last)

    def _make(self, samples: Sequence[int]) -> Batch:
        read = [self.dataset.sample(index) for index in samples]

        def stacked(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(sample, name) for sample in read]))

        fields = {name: stacked(name) for name in Sample.__dataclass_fields__}
        return Batch(samples=tuple(samples), **fields)


@contextmanager
def _ignoring_empty() -> Iterator[None]:
    try:
        yield
    except queue.Empty:
        return
