"""What a run tells the programs that watch it: one JSON object a line, versioned, in a file for each rank.

``docs/ltf-events.md`` is the reference for readers, ``events.schema.json`` (beside this module) the schema.
Numbers keep every bit: a reader that parses them as IEEE doubles gets the values that were computed. A float
that JSON has no word for is the string "nan", "inf" or "-inf".
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from ltf.findings import Finding, Json, Severity

VERSION = 1
SCHEMA = Path(__file__).with_name("events.schema.json")


@dataclass(frozen=True)
class Where:
    """A rank and the hardware it runs on; `device` as torch names it, such as ``cuda:3``."""

    rank: int
    node: str
    device: str


class CheckpointReason(StrEnum):
    """Why a save began. `guard`: a finding asked for it."""

    INTERVAL = "interval"
    TIME = "time"
    SIGNAL = "signal"
    END = "end"
    GUARD = "guard"


class ResumeReason(StrEnum):
    """A new attempt went on from a checkpoint, or a guard sent a running one back to it."""

    RESTART = "restart"
    ROLL_BACK = "roll_back"


class ExitReason(StrEnum):
    FINISHED = "finished"
    SIGNAL = "signal"
    GUARD = "guard"
    ERROR = "error"


class Phase(StrEnum):
    """What the training thread is at."""

    START = "start"
    STEP = "step"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    REPLAY = "replay"


@dataclass(frozen=True)
class RunStarted:
    """An attempt's first line. `roster`, `config`, `layout`, `model`: rank 0 gives them, others null."""

    event: ClassVar[str] = "run_started"
    where: Where
    world: int
    pid: int
    steps: int
    versions: Mapping[str, str]
    roster: tuple[Where, ...] | None = None
    config: Mapping[str, Json] | None = None
    layout: Mapping[str, int] | None = None
    model: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Resumed:
    """`step`: the last step that is part of the state; the next is one more."""

    event: ClassVar[str] = "resumed"
    step: int
    checkpoint: str
    reason: ResumeReason
    seconds: float


@dataclass(frozen=True)
class Step:
    """An optimizer step of the whole run, told by rank 0 when done; null: not measured or not known."""

    event: ClassVar[str] = "step"
    step: int
    loss: float
    tokens: int
    seconds: float
    loss_tokens: int | None = None
    gradient_norm: float | None = None
    lr: float | None = None
    skipped: bool = False
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    data_stall_seconds: float | None = None
    checkpoint_stall_seconds: float | None = None
    gc_seconds: float | None = None
    balance_loss: float | None = None
    z_loss: float | None = None
    expert_load: float | None = None
    own_seconds: tuple[float, ...] | None = None
    layer_gradient_norms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    event: ClassVar[str] = "evaluation"
    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class CheckpointStarted:
    event: ClassVar[str] = "checkpoint_started"
    step: int
    path: str
    reason: CheckpointReason
    background: bool


@dataclass(frozen=True)
class CheckpointSaved:
    """All ranks' files are durable and the commit marker is there."""

    event: ClassVar[str] = "checkpoint_saved"
    step: int
    path: str
    bytes: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True)
class CheckpointVerified:
    event: ClassVar[str] = "checkpoint_verified"
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class CheckpointQuarantined:
    """`step`: null where the checkpoint cannot tell. `path`: where it was; `moved_to`: where it lies now."""

    event: ClassVar[str] = "checkpoint_quarantined"
    step: int | None
    path: str
    moved_to: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A guard's or a watch's finding; `where`: the node and the device of each of its ranks."""

    event: ClassVar[str] = "finding"
    kind: str
    severity: Severity
    step: int
    message: str
    ranks: tuple[int, ...]
    where: tuple[Where, ...]
    evidence: Mapping[str, Json]

    @classmethod
    def of(cls, finding: Finding, where: tuple[Where, ...] = ()) -> Found:
        return cls(
            kind=finding.kind,
            severity=finding.severity,
            step=finding.step,
            message=finding.message,
            ranks=finding.ranks,
            where=where,
            evidence=finding.evidence,
        )


@dataclass(frozen=True)
class Balance:
    """A new plan from `step` on: micro-batches by unit; the slowest unit's seconds by old and new plan."""

    event: ClassVar[str] = "balance"
    step: int
    counts: tuple[int, ...]
    counts_before: tuple[int, ...]
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class Heartbeat:
    """The process lives; whether its training thread gets on, `progress` and `quiet_seconds` say."""

    event: ClassVar[str] = "heartbeat"
    step: int
    phase: Phase
    phase_seconds: float
    progress: int
    quiet_seconds: float


@dataclass(frozen=True)
class Exited:
    """The last line of an attempt that could still write one. `step`: the last step done."""

    event: ClassVar[str] = "exited"
    step: int
    status: int
    reason: ExitReason
    message: str


Event = (
    RunStarted
    | Resumed
    | Step
    | Evaluation
    | CheckpointStarted
    | CheckpointSaved
    | CheckpointVerified
    | CheckpointQuarantined
    | Found
    | Balance
    | Heartbeat
    | Exited
)
KINDS: tuple[type[Event], ...] = Event.__args__


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank's events are."""
    return folder / f"events-rank{rank:05}.jsonl"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of one file in order. What a killed writer or a full disk left torn is passed over."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


@dataclass
class Writer:
    """Appends a rank's events to its file, from any thread; the kernel has an event when `write` returns.

    A SIGKILL thus loses nothing that was written; only a machine's end may. What cannot be written (a full
    or read-only disk) is counted in `lost` and never raised: training does not end for want of a line.
    `complain` hears of it when it begins and when it is over; the file then holds a finding `events.lost`.

    `run` and `attempt` come from LTP_RUN_ID and LTP_ATTEMPT; without them the run's name is `run` and the
    attempt is how many the file already tells of, or TORCHELASTIC_RESTART_COUNT where that is more.
    """

    folder: Path
    rank: int
    run: str
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    clock: Callable[[], float] = time.time
    complain: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def __post_init__(self) -> None:
        self.path = path_of(self.folder, self.rank)
        self.lost = 0
        self.run = self.environment.get("LTP_RUN_ID") or self.run
        self.attempt = self._attempt()
        # The thread that holds it may be interrupted by a signal handler that writes too.
        self._lock = threading.RLock()
        self._file: int | None = None
        self._torn = False
        self._lost_now = 0

    def write(self, event: Event) -> None:
        line = self._line(event)
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                self._lose(error)
                return
            if self._lost_now:
                self._recovered()

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, event: Event) -> bytes:
        head = {
            "v": VERSION,
            "t": round(self.clock(), 6),
            "run": self.run,
            "attempt": self.attempt,
            "rank": self.rank,
            "event": event.event,
        }
        # Evidence may hold what JSON does not know, a path say: as text it serves better than as an error.
        return json.dumps(head | _plain(event), allow_nan=False, default=str).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        file = self._opened()
        # A line that was cut off is closed first, so that readers find the next one.
        whole = b"\n" + line if self._torn else line
        while whole:
            written = os.write(file, whole)
            whole = whole[written:]
            self._torn = bool(whole)

    def _opened(self) -> int:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._file).st_size
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        return self._file

    def _lose(self, error: OSError) -> None:
        self.lost += 1
        self._lost_now += 1
        if self._lost_now == 1:
            self.complain(
                f"warning: rank {self.rank} cannot write events to {self.path}: {error.strerror or error}; "
                "training goes on and they are lost until it can"
            )

    def _recovered(self) -> None:
        lost, self._lost_now = self._lost_now, 0
        message = f"{lost} events of rank {self.rank} before this line could not be written"
        self.complain(f"warning: events are written again: {message}")
        self.write(
            Found(
                kind="events.lost",
                severity=Severity.WARNING,
                step=-1,
                message=message,
                ranks=(),
                where=(),
                evidence={"lines": lost},
            )
        )

    def _attempt(self) -> int:
        given = self.environment.get("LTP_ATTEMPT", "")
        if given.isascii() and given.isdigit():
            return int(given)
        restarts = self.environment.get("TORCHELASTIC_RESTART_COUNT", "")
        known = int(restarts) if restarts.isascii() and restarts.isdigit() else 0
        try:
            told = sum(1 for event in read(self.path) if event["event"] == RunStarted.event)
        except OSError:
            return known
        return max(known, told)


def _plain(value: Any) -> Any:
    """As JSON has it. Mappings and sequences inside evidence may hold floats that JSON has no word for."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
