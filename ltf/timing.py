"""How long a rank's own work takes, apart from the time it waits for others, and which ranks are slow."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from torch import nn

from ltf.config import schema
from ltf.findings import Finding, Json, Severity

JITTER_STEPS = 100
"""Steps of a rank's own past in which jitter is looked for: enough for a 95th percentile."""
JITTER_BURSTS = 3
"""Slow steps must come and go at least so often; fewer are a rank that became slow: another finding."""


@dataclass(frozen=True)
class OwnSeconds:
    """Of one step's forward passes, and the samples that went through them."""

    seconds: float
    rows: int

    @property
    def per_row(self) -> float:
        """NaN when nothing was measured."""
        return self.seconds / self.rows if self.rows else float("nan")


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
        self, modules: Iterable[nn.Module], device: torch.device, clock: Clock | None = None
    ) -> None:
        """`clock`: in place of the device's own."""
        self._clock: Clock = clock or (HostClock() if device.type == "cpu" else DeviceClock(device))
        self._spans: list[tuple[Any, Any]] = []
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
        taken = OwnSeconds(self._clock.seconds(self._spans), self._rows)
        self._spans, self._rows, self._running = [], 0, None
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
            self._spans.append((self._began, self._clock.mark()))
            self._running = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pause(self) -> None:
        if self._running is not None and not _in_backward():
            self._spans.append((self._began, self._clock.mark()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _go_on(self) -> None:
        if self._running is not None and not _in_backward():
            self._began = self._clock.mark()


class SlowRanks:
    """Says which ranks became slow or unsteady, and which are so no longer. Pure and the same on every rank.

    *Slow*: over the last `settings.slow_steps` steps, the median of a rank's seconds a row relative to the
    median of its peers' at the same step is `settings.slow_factor` or more. Peers are the other ranks of its
    group, those that do the same work (a pipeline's first stage is no peer of its last); a rank without any
    is not judged. *Jitter*: of its last `JITTER_STEPS` steps, the 95th percentile is
    `settings.jitter_factor` times its own median or more. Either is over when the factor's excess over 1 has
    fallen to half the limit's.
    """

    def __init__(self, settings: schema.Noise, groups: Sequence[Hashable]) -> None:
        """`groups`: each rank's."""
        self._settings = settings
        self._peers = [
            [other for other, theirs in enumerate(groups) if theirs == group and other != rank]
            for rank, group in enumerate(groups)
        ]
        self._pasts = [_Past.empty(settings.slow_steps) for _ in groups]

    def observe(self, step: int, seconds_per_row: Sequence[float]) -> list[Finding]:
        """By rank, NaN where nothing was measured; what changed with this step."""
        if len(seconds_per_row) != len(self._pasts):
            raise ValueError(f"step {step}: {len(seconds_per_row)} measurements of {len(self._pasts)} ranks")
        found = []
        for rank, (own, past) in enumerate(zip(seconds_per_row, self._pasts, strict=True)):
            if not _measured(own):
                continue
            past.own.append((step, own))
            others = [seconds_per_row[peer] for peer in self._peers[rank] if _measured(seconds_per_row[peer])]
            if others:
                past.ratios.append((step, own / median(others)))
            found += [each for each in (self._slow(step, rank), self._jitter(step, rank)) if each is not None]
        return found

    def state(self) -> dict[str, Json]:
        """For a checkpoint."""
        return {"ranks": [past.state() for past in self._pasts]}

    def restore(self, state: dict[str, Json]) -> None:
        """Take up a state; one of another number of ranks means nothing here and is left."""
        ranks = state["ranks"]
        if isinstance(ranks, list) and len(ranks) == len(self._pasts):
            self._pasts = [_Past.of(each, self._settings.slow_steps) for each in ranks]

    def _slow(self, step: int, rank: int) -> Finding | None:
        past, limit = self._pasts[rank], self._settings.slow_factor
        if len(past.ratios) < self._settings.slow_steps:
            return None
        factor = median(ratio for _, ratio in past.ratios)
        if past.slow_since is None and factor >= limit:
            past.slow_since = next(at for at, ratio in past.ratios if ratio >= limit)
            return Finding(
                kind="slow_rank",
                severity=Severity.WARNING,
                step=step,
                message=f"rank {rank} takes {factor:.2f} times as long as its peers for its own work since "
                f"step {past.slow_since} (limit {limit:g}, median of {len(past.ratios)} steps)",
                ranks=(rank,),
                evidence={"factor": factor, "since": past.slow_since, "limit": limit},
            )
        if past.slow_since is not None and factor < _calm(limit):
            since, past.slow_since = past.slow_since, None
            return Finding(
                kind="slow_rank.over",
                severity=Severity.INFO,
                step=step,
                message=f"rank {rank}, slow since step {since}, keeps up again: {factor:.2f} times its peers",
                ranks=(rank,),
                evidence={"factor": factor, "since": since, "limit": limit},
            )
        return None

    def _jitter(self, step: int, rank: int) -> Finding | None:
        past, limit = self._pasts[rank], self._settings.jitter_factor
        if len(past.own) < JITTER_STEPS:
            return None
        seconds = sorted(each for _, each in past.own)
        middle, high = median(seconds), seconds[math.ceil(0.95 * len(seconds)) - 1]
        factor = high / middle
        if (
            past.jitter_since is None
            and factor >= limit
            and _bursts(past.own, limit * middle) >= JITTER_BURSTS
        ):
            past.jitter_since = next(at for at, each in past.own if each >= limit * middle)
            return Finding(
                kind="jitter",
                severity=Severity.WARNING,
                step=step,
                message=f"rank {rank} is unsteady since step {past.jitter_since}: its slowest twentieth of "
                f"{len(seconds)} steps takes {factor:.2f} times its own median or more (limit {limit:g})",
                ranks=(rank,),
                evidence={
                    "factor": factor,
                    "since": past.jitter_since,
                    "limit": limit,
                    "median_seconds_per_row": middle,
                    "p95_seconds_per_row": high,
                },
            )
        if past.jitter_since is not None and factor < _calm(limit):
            since, past.jitter_since = past.jitter_since, None
            return Finding(
                kind="jitter.over",
                severity=Severity.INFO,
                step=step,
                message=f"rank {rank}, unsteady since step {since}, is steady again: {factor:.2f}",
                ranks=(rank,),
                evidence={"factor": factor, "since": since, "limit": limit},
            )
        return None


@dataclass
class _Past:
    """(step, value) pairs, newest last; `slow_since`, `jitter_since`: set while the finding stands."""

    ratios: deque[tuple[int, float]]
    own: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=JITTER_STEPS))
    slow_since: int | None = None
    jitter_since: int | None = None

    @classmethod
    def empty(cls, slow_steps: int) -> _Past:
        return cls(deque(maxlen=slow_steps))

    @classmethod
    def of(cls, state: Any, slow_steps: int) -> _Past:
        past = cls.empty(slow_steps)
        past.ratios.extend((step, ratio) for step, ratio in state["ratios"])
        past.own.extend((step, own) for step, own in state["own"])
        past.slow_since, past.jitter_since = state["slow_since"], state["jitter_since"]
        return past

    def state(self) -> dict[str, Json]:
        return {
            "ratios": [list(pair) for pair in self.ratios],
            "own": [list(pair) for pair in self.own],
            "slow_since": self.slow_since,
            "jitter_since": self.jitter_since,
        }


def _measured(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0


def _calm(limit: float) -> float:
    return 1 + (limit - 1) / 2


def _bursts(own: Iterable[tuple[int, float]], limit: float) -> int:
    """How many runs of slow steps there are."""
    slow = [each >= limit for _, each in own]
    return sum(now and not before for before, now in zip([False, *slow], slow, strict=False))


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
