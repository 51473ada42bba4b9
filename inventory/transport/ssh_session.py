"""One command over an open SSH connection, from the exec request to the last byte of output."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import asyncssh

from inventory.transport import Command, Ending, Phase
from inventory.transport.output import Output, Stop
from inventory.transport.phases import PhaseClock, PhaseError, limited
from inventory.transport.watchdog import HEARTBEAT, LOGIN_LINE, RENEWAL

WINDOW = 1 << 20
"""Bytes that a node may send ahead of us: what a flood costs at most in memory, per node."""


class Session(asyncssh.SSHClientSession[bytes]):
    """What the node says about the command. Public attributes are final once `wait` has returned."""

    def __init__(self, command: Command, opening: bytes, output: Output, keepalive: float) -> None:
        self.status: int | None = None
        self.signal: str | None = None
        self.error: Exception | None = None
        self._command, self._opening, self._output, self._keepalive = command, opening, output, keepalive
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[Stop] = self._loop.create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None

    async def start(self, connection: asyncssh.SSHClientConnection, clock: PhaseClock) -> None:
        """Ask the node to run the command and hand it its input. Raises PhaseError."""
        limits, factory = self._command.limits, _factory(self)
        try:
            async with limited(
                clock, Phase.EXEC, limits.exec, "the node let us in but did not start the command"
            ):
                # An empty environment and no terminal, whatever ssh_config's SendEnv and RequestTTY say:
                # a command is to find the same on every node.
                self._channel, _ = await connection.create_session(
                    factory, LOGIN_LINE, env={}, send_env=[], request_pty=False, encoding=None, window=WINDOW
                )
        except asyncssh.ChannelOpenError as error:
            if connection.is_closed():
                raise PhaseError(
                    Ending.LOST, Phase.EXEC, "the node hung up instead of starting the command"
                ) from error
            message = f"the node let us in but refuses to run a command: {error.reason} (sshd's MaxSessions?)"
            raise PhaseError(Ending.REJECTED, Phase.EXEC, message) from error
        except (asyncssh.Error, OSError) as error:
            message = f"the node hung up instead of starting the command: {error}"
            raise PhaseError(Ending.LOST, Phase.EXEC, message) from error
        clock.enter(Phase.COMMAND)
        if not self._channel.is_closing():
            self._channel.write(self._opening)
        if not math.isinf(limits.command):
            self._later("limit", limits.command, lambda: self._stop(Stop.LIMIT))
        # Not before: a timer for every packet of a command that is over in a moment costs time on each node.
        if self._keepalive > 0:
            self._later("keepalive", self._keepalive, connection.set_keepalive, self._keepalive, 3)
        if not self._command.self_watching:
            self._later("renewal", RENEWAL, self._renew)

    async def wait(self) -> Stop:
        try:
            return await self._stopped
        finally:
            for timer in self._timers.values():
                timer.cancel()
            # Otherwise bytes that arrive after the verdict would still be added to it.
            self._output = Output("", self._command.limits, None)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if not self._stopped.done() and not self._output.take(data, stderr=datatype is not None):
            self._stop(Stop.FLOOD)

    def eof_received(self) -> bool:
        # True keeps our direction open: a command that closes its stdout early is still guarded by its stdin.
        return True

    def exit_status_received(self, status: int) -> None:
        self.status = status
        self._exited()

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self.signal = signal
        self._exited()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._stop(Stop.CLOSED)

    def _renew(self) -> None:
        """Tell the watchdog that somebody is still waiting."""
        if self._channel is None or self._channel.is_closing():
            return
        self._channel.write(HEARTBEAT)
        self._later("renewal", RENEWAL, self._renew)

    def _exited(self) -> None:
        self._later("output", self._command.limits.output, lambda: self._stop(Stop.HELD))

    def _stop(self, stop: Stop) -> None:
        if not self._stopped.done():
            self._stopped.set_result(stop)

    def _later(self, name: str, seconds: float, call: Any, *args: Any) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        if not self._stopped.done():
            self._timers[name] = self._loop.call_later(seconds, call, *args)


def _factory(session: Session) -> Any:
    return lambda: session
