"""Running a command on a node: what to run, within which limits, and every way in which it can end.

The same interface serves SSH (`ssh.py`) and this machine (`local.py`). A transport never raises for
what happens on a node or on the way to it: every ending is an :class:`Outcome`.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from inventory.fleet import Node

if TYPE_CHECKING:
    from inventory.transport.settings import SshSettings


class Phase(enum.StrEnum):
    """How far it got."""

    RESOLVE = "resolve"
    CONNECT = "connect"
    BANNER = "banner"
    KEY_EXCHANGE = "key_exchange"
    HOST_KEY = "host_key"
    AUTH = "auth"
    EXEC = "exec"
    COMMAND = "command"
    OUTPUT = "output"


class Ending(enum.StrEnum):
    """How it ended. Only EXIT carries an exit status; LOST is never a success."""

    EXIT = "exit"
    SIGNAL = "signal"
    TIMEOUT = "timeout"
    LOST = "lost"
    REFUSED = "refused"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for each phase, and caps on output. A phase that passes its limit ends as TIMEOUT there."""

    resolve: float = 5.0
    connect: float = 10.0
    banner: float = 10.0
    handshake: float = 10.0
    """Key exchange and host key."""
    auth: float = 15.0
    exec: float = 10.0
    """From being let in until the node has accepted the command."""
    command: float = 60.0
    """``math.inf`` for a command that runs as long as it likes (a launcher's agent, streamed for days)."""
    output: float = 5.0
    """After the command has ended: how long its pipes may stay open (a daemon that kept stdout)."""
    stdout_bytes: int = 8 << 20
    stderr_bytes: int = 256 << 10


@dataclass(frozen=True, slots=True)
class Retry:
    """Retries of the connecting phases only; a command that may have started is never repeated."""

    attempts: int = 2
    pause: float = 0.5
    """Seconds before the second attempt; doubles, with full jitter."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run: an argument vector (quoted for the remote shell by the transport) and its input."""

    argv: tuple[str, ...]
    stdin: bytes = b""
    limits: Limits = field(default_factory=Limits)
    self_watching: bool = False
    """The command itself dies when its stdin ends (the probe agent does). Its stdin then stays open until
    it exits, and the transport adds no watchdog of its own."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one command on one node ended, with all the output that was read until then."""

    node: str
    ending: Ending
    phase: Phase
    status: int | None = None
    """Exit status; only with Ending.EXIT."""
    signal: str | None = None
    """Signal name without SIG, e.g. ``KILL``; only with Ending.SIGNAL."""
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    """Output passed its cap; what came after it was dropped."""
    seconds: float = 0.0
    connect_seconds: float = 0.0
    attempts: int = 1
    message: str = ""
    """One line for a person: what happened and, where it helps, what to do."""
    started_at: float = 0.0
    """Unix time of this machine when the node accepted the command (0: it never did), and when it ended. What
    a node says about its own time is compared with these: the node's clock plays no part in any limit."""
    ended_at: float = 0.0
    phase_seconds: Mapping[Phase, float] = field(default_factory=dict)
    """How long each phase of the last attempt took, up to and including the one it ended in."""

    @property
    def ok(self) -> bool:
        return self.ending is Ending.EXIT and self.status == 0

    @property
    def reached(self) -> bool:
        """A command ran on the node (however it ended)."""
        return self.phase in (Phase.COMMAND, Phase.OUTPUT)


OnOutput = Callable[[str, bytes], None]
"""Called with (node name, bytes) for every piece of stdout as it arrives, before any cap is applied to what
is kept."""


class Transport(Protocol):
    """One way to run commands. Use as an async context manager: leaving it closes every connection.

    `run` raises only for what a person or the caller got wrong (UsageError: a NUL in argv, a broken
    ssh_config) and CancelledError when its task is cancelled; the outcome so far is then
    attached to it (`inventory.transport.ending.outcome_of`).
    """

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome: ...

    async def __aenter__(self) -> Transport: ...

    async def __aexit__(self, *exc: object) -> None: ...


class FanOut(Protocol):
    """`transport/fanout.py`: many nodes at once; yields each outcome as it comes."""

    def __call__(
        self,
        transport: Transport,
        work: Iterable[tuple[Node, Command]],
        concurrency: int = 64,
        on_output: OnOutput | None = None,
    ) -> AsyncIterator[Outcome]: ...


def transport_for(
    nodes: Iterable[Node], settings: SshSettings, fleet: Mapping[str, Node] | None = None
) -> Transport:
    """The transport for `nodes`: local ones are served without SSH, all others over it.

    `fleet` holds the nodes whose names may stand for jump hosts; without it, those of `nodes`.
    """
    from inventory.transport.routing import RoutedTransport

    return RoutedTransport(settings, fleet if fleet is not None else {node.name: node for node in nodes})
