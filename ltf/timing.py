"""How long a rank's own work takes, apart from the time it waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class OwnSeconds:
    """Of one step's forward passes, and the samples that went through them.

    `uneven`: the part of `seconds` that follows from more than the number of rows, as in experts to which
    other ranks send tokens: a rank with the favoured ones has more work, and is not slow.
    """

    seconds: float
    rows: int
    uneven: float = 0.0

    @property
    def per_row(self) -> float:
        """NaN when nothing was measured."""
        return self.seconds / self.rows if self.rows else float("nan")

    @property
    def even_per_row(self) -> float:
        """What ranks can be compared by; NaN when nothing was measured."""
        even = self.seconds - self.uneven
        return even / self.rows if self.rows and even > 0 else float("nan")


class Clock(Protocol):
    """Marks moments of the device's work; they are read together, once a step."""

    def mark(self) -> Any: ...

    def seconds(self, spans: list[tuple[Any, Any]]) -> float: ...


class OwnWork:
    """Times a rank's own computing in the forward passes of `modules`, which run one after another.

    A collective makes all ranks look equally slow, so the watch runs only between them: it starts behind
    FSDP's gathering of a module's parameters and stops before it frees them (fully_shard puts its pre-hook in
    front of the others and its forward hook behind them, whether it came before this or after), and it stands
    still inside `elsewhere`, which a token exchange enters around its collectives. Hooks of what encloses or
    is enclosed by a running module count nothing twice. A forward pass that is computed again inside a
    backward pass, and one without gradients (an evaluation), are not counted: ranks would differ in how many
    they run.

    Rows are counted at the first of `modules`: the first dimension of its first tensor.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device,
        clock: Clock | None = None,
        *,
        uneven: Collection[nn.Module] = (),
    ) -> None:
        """`clock`: in place of the device's own. `uneven`: those of `modules` whose time is `uneven`."""
        self._clock: Clock = clock or (HostClock() if device.type == "cpu" else DeviceClock(device))
        self._uneven = frozenset(uneven)
        self._spans: list[tuple[Any, Any]] = []
        self._uneven_spans: list[tuple[Any, Any]] = []
        self._rows = 0
        self._running: nn.Module | None = None
        self._began: Any = None
        self._handles = []
        self._first: nn.Module | None = None
        for module in modules:
            self._first = self._first or module
            self._handles.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._stop, prepend=True))

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside it the rank waits for others."""
        self._pause()
        try:
            yield
        finally:
            self._go_on()

    def take(self) -> OwnSeconds:
        """What came together since the last call.

        On an accelerator it waits for the device to reach the end of the last forward pass: call it once a
        step, after the step's loss was read, and there is nothing left to wait for.
        """
        even, uneven = self._clock.seconds(self._spans), self._clock.seconds(self._uneven_spans)
        taken = OwnSeconds(even + uneven, self._rows, uneven)
        self._spans, self._uneven_spans, self._rows, self._running = [], [], 0, None
        return taken

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    # Under torch.compile the watch is no part of the graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A module that is still running although it starts again ended with an exception: begin anew.
        if self._running not in (None, module) or not torch.is_grad_enabled() or _in_backward():
            return
        self._running = module
        if module is self._first:
            self._rows += next(
                (each.shape[0] for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), 0
            )
        self._began = self._clock.mark()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stop(self, module: nn.Module, args: object, output: object) -> None:
        if self._running is module and not _in_backward():
            self._count(module)
            self._running = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pause(self) -> None:
        if self._running is not None and not _in_backward():
            self._count(self._running)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _go_on(self) -> None:
        if self._running is not None and not _in_backward():
            self._began = self._clock.mark()

    def _count(self, module: nn.Module) -> None:
        spans = self._uneven_spans if module in self._uneven else self._spans
        spans.append((self._began, self._clock.mark()))


class HostClock:
    """Where operations are done when they return. `now`: seconds from any start."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> float:
        return self._now()

    def seconds(self, spans: list[tuple[float, float]]) -> float:
        return sum(end - start for start, end in spans)


class DeviceClock:
    """Where they are only queued: events in the stream that computes. They are used again step after step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.Event] = []

    def mark(self) -> torch.Event:
        event = self._free.pop() if self._free else torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: list[tuple[torch.Event, torch.Event]]) -> float:
        if not spans:
            return 0.0
        # A stream works in order: when the last is reached, all are.
        spans[-1][1].synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in spans)
        for span in spans:
            self._free.extend(span)
        return milliseconds / 1000


def _in_backward() -> bool:
    """Whether this thread runs a node of a backward pass, where recomputation happens."""
    return torch._C._current_graph_task_id() != -1
