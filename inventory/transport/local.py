"""This machine, without SSH: the same interface, limits and guarantees."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import psutil

from inventory.fleet import Node
from inventory.transport import Command, Ending, OnOutput, Outcome, Phase
from inventory.transport.ending import attach
from inventory.transport.output import HELD, Output, Stop
from inventory.transport.phases import PhaseClock
from inventory.transport.watchdog import HEARTBEAT, LOGIN_LINE, RENEWAL, opening

_GRACE = 4.0
"""Seconds that a command has to end after its stdin has; the watchdog kills it after half of them."""


class LocalTransport:
    """Runs commands as children of this process, each the leader of a session of its own.

    They are guarded by the same watchdog as on a node, so they also end when this process is killed.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    async def __aenter__(self) -> LocalTransport:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome:
        """Run `command` on this machine; as `SshTransport.run`, with nothing to connect to."""
        start = opening(command, secrets.token_hex(8))
        output = Output(node.name, command.limits, on_output)
        clock = PhaseClock.start()
        clock.enter(Phase.EXEC)
        begun, started_at = clock.since, self._clock()

        def outcome(ending: Ending, phase: Phase, message: str = "", **how: Any) -> Outcome:
            clock.stop()
            return Outcome(
                node=node.name,
                ending=ending,
                phase=phase,
                stdout=bytes(output.stdout),
                stderr=bytes(output.stderr),
                truncated=output.truncated,
                seconds=clock.now() - begun,
                message=message,
                started_at=started_at,
                ended_at=self._clock(),
                phase_seconds=MappingProxyType(dict(clock.seconds)),
                **how,
            )

        loop = asyncio.get_running_loop()
        try:
            transport, child = await loop.subprocess_exec(
                lambda: _Child(command, start, output), "/bin/sh", "-c", _AS_ON_A_NODE, start_new_session=True
            )
        except OSError as error:
            return outcome(Ending.FAILED, Phase.EXEC, f"no process could be started: {error.strerror}")
        clock.enter(Phase.COMMAND)
        try:
            stop = await child.wait()
        except asyncio.CancelledError as error:
            attach(error, outcome(Ending.CANCELLED, Phase.COMMAND, "interrupted"))
            raise
        finally:
            await _end(transport, child)
        return _judge(stop, child.code, command, output, outcome)


_AS_ON_A_NODE = LOGIN_LINE.removeprefix("exec /bin/sh -c ").strip("'")


def _judge(
    stop: Stop, code: int | None, command: Command, output: Output, outcome: Callable[..., Outcome]
) -> Outcome:
    limits = command.limits
    if stop is Stop.FLOOD:
        return outcome(Ending.FAILED, Phase.OUTPUT, output.flood())
    if stop is Stop.LIMIT:
        return outcome(
            Ending.TIMEOUT,
            Phase.COMMAND,
            f"the command did not end within {limits.command:g} s and was stopped",
        )
    phase, message = Phase.COMMAND, ""
    if stop is Stop.HELD:
        phase = Phase.OUTPUT
        message = HELD.format(limits.output)
    if code is None:
        return outcome(Ending.LOST, phase, "how the command ended is not known")
    if code < 0:
        name = signal.Signals(-code).name.removeprefix("SIG") if -code in _KNOWN_SIGNALS else str(-code)
        return outcome(
            Ending.SIGNAL, phase, message or f"the command was ended by signal {name}", signal=name
        )
    return outcome(Ending.EXIT, phase, message, status=code)


_KNOWN_SIGNALS = {int(number) for number in signal.Signals}


class _Child(asyncio.SubprocessProtocol):
    """What the process says; `wait` returns when it has ended or has to be stopped."""

    def __init__(self, command: Command, opening: bytes, output: Output) -> None:
        self.code: int | None = None
        self.exited = asyncio.Event()
        self._command, self._opening, self._output = command, opening, output
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[Stop] = self._loop.create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._open_pipes = {1, 2}
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        command, limits = self._command, self._command.limits
        transport.get_pipe_transport(0).write(self._opening)
        if not math.isinf(limits.command):
            self._timers["limit"] = self._loop.call_later(limits.command, self._stop, Stop.LIMIT)
        if not command.self_watching:
            self._timers["renewal"] = self._loop.call_later(RENEWAL, self._renew)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if not self._stopped.done() and not self._output.take(data, stderr=fd == 2):
            self._stop(Stop.FLOOD)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open_pipes.discard(fd)
        self._finish()

    def process_exited(self) -> None:
        self.code = self._transport.get_returncode()
        self.exited.set()
        self._timers["output"] = self._loop.call_later(self._command.limits.output, self._stop, Stop.HELD)
        self._finish()

    async def wait(self) -> Stop:
        try:
            return await self._stopped
        finally:
            for timer in self._timers.values():
                timer.cancel()

    def _finish(self) -> None:
        if self.exited.is_set() and not self._open_pipes:
            self._stop(Stop.CLOSED)

    def _renew(self) -> None:
        pipe = self._transport.get_pipe_transport(0)
        if pipe is not None and not pipe.is_closing() and not self._stopped.done():
            pipe.write(HEARTBEAT)
            self._timers["renewal"] = self._loop.call_later(RENEWAL, self._renew)

    def _stop(self, stop: Stop) -> None:
        if not self._stopped.done():
            self._stopped.set_result(stop)


async def _end(transport: asyncio.SubprocessTransport, child: _Child) -> None:
    """Leave no process of a command that did not end by itself, and no pipe of one that did.

    Closing its stdin comes first and alone: the watchdog (or the command that watches itself) must see that
    while the command still lives, since it leaves the daemons of a command that ended by itself alone.
    """
    if not child.exited.is_set():
        pid = transport.get_pid()
        tree = _tree(pid)
        stdin = transport.get_pipe_transport(0)
        if stdin is not None:
            stdin.close()
        try:
            async with asyncio.timeout(_GRACE):
                await child.exited.wait()
        except TimeoutError:
            _signal_group(pid, signal.SIGKILL)
        finally:
            for process in tree:
                _kill(process)
    transport.close()
    # The pipes close in the loop's next round; the caller may not give it another.
    await asyncio.sleep(0)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return
