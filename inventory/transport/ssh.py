"""SSH to many nodes from one event loop (asyncssh).

A transport never raises for what happens on a node or on the way to it: every ending is an Outcome whose
phase says how far it got. See docs/transport.md for what each phase means and what is guaranteed on the node.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Mapping
from types import MappingProxyType

import asyncssh

from inventory.fleet import Node
from inventory.transport import Command, Ending, Limits, OnOutput, Outcome, Phase
from inventory.transport.ending import attach
from inventory.transport.handshake import shake_hands
from inventory.transport.jump import JumpHosts
from inventory.transport.output import HELD, Output, Stop
from inventory.transport.phases import PhaseClock, PhaseError, dial, resolve, resolve_in_a_thread
from inventory.transport.proxy import open_proxy
from inventory.transport.settings import SshSettings
from inventory.transport.ssh_options import SshOptions, Target
from inventory.transport.ssh_session import Session
from inventory.transport.watchdog import opening


class SshTransport:
    """Runs commands over SSH. `nodes` are those whose names may be used as jump hosts.

    A connection serves one command. Nothing here limits how many run at once: `fan_out` does.
    """

    def __init__(self, settings: SshSettings, nodes: Mapping[str, Node] = MappingProxyType({})) -> None:
        self._settings = settings
        self._options: SshOptions | None = None
        self._open: set[asyncssh.SSHClientConnection] = set()
        self._jumps = JumpHosts(self._connect_hop, nodes, settings.jump_memory)

    async def __aenter__(self) -> SshTransport:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._jumps.close()
        closing = list(self._open)
        for connection in closing:
            connection.close()
        await asyncio.gather(*(connection.wait_closed() for connection in closing))

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome:
        """Run `command` on `node` and say how it ended.

        With ``limits.command`` infinite and `on_output` given this streams for as long as the command lives:
        what is kept is still capped, nothing grows, and a node that has gone silent ends as LOST after three
        unanswered keepalives.
        """
        start = opening(command, secrets.token_hex(8))
        run = _Run(node, command, Output(node.name, command.limits, on_output), self._settings)
        try:
            return await self._run(run, start)
        except asyncio.CancelledError as error:
            attach(error, run.outcome(Ending.CANCELLED, run.clock.phase, "interrupted"))
            raise

    async def _run(self, run: _Run, start: bytes) -> Outcome:
        try:
            connection = await self._connect(run.node, run.command.limits, run)
        except PhaseError as error:
            return run.outcome(error.ending, error.phase, error.message)
        run.connected()
        session = Session(run.command, start, run.output, self._settings.keepalive)
        try:
            await session.start(connection, run.clock)
            run.started_at = self._settings.clock()
            return run.judge(await session.wait(), session)
        except PhaseError as error:
            return run.outcome(error.ending, error.phase, error.message)
        finally:
            # Hanging up is what stops a command that is still running: its watchdog sees its stdin end.
            connection.close()
            self._open.discard(connection)
            # The socket closes in the loop's next round; the caller may not give it another.
            await asyncio.sleep(0)

    async def _connect(self, node: Node, limits: Limits, run: _Run) -> asyncssh.SSHClientConnection:
        retry = self._settings.retry
        while True:
            run.attempts += 1
            run.clock = PhaseClock.start()
            try:
                return await self._attempt(node, limits, run.clock)
            except PhaseError as error:
                if run.attempts >= retry.attempts or not error.again:
                    raise
            await asyncio.sleep(self._settings.rng.uniform(0, retry.pause * 2 ** (run.attempts - 1)))

    async def _attempt(self, node: Node, limits: Limits, clock: PhaseClock) -> asyncssh.SSHClientConnection:
        if self._options is None:
            self._options = SshOptions(self._settings)
        target = self._options.target(node)
        way = await self._way(target, limits, clock)
        try:
            connection = await shake_hands(target, way, limits, clock, self._settings.accept_new)
        except BaseException:
            if isinstance(way, socket.socket):
                way.close()
            raise
        self._open.add(connection)
        return connection

    async def _way(
        self, target: Target, limits: Limits, clock: PhaseClock
    ) -> socket.socket | asyncssh.SSHClientConnection:
        """What the handshake goes over: a jump host's connection, a proxy command, or a TCP connection."""
        # `Host * / ProxyJump gate` matches the gate itself: it is then reached directly.
        if target.jump is not None and target.jump not in (target.name, target.host):
            return await self._jumps.reach(target.jump, limits)
        if target.proxy_command:
            return await open_proxy(target.proxy_command, clock)
        resolver = self._settings.resolver or resolve_in_a_thread
        addresses = await resolve(target.host, target.port, limits, clock, resolver)
        return await dial(target.host, addresses, limits, clock)

    async def _connect_hop(self, hop: Node, limits: Limits) -> asyncssh.SSHClientConnection:
        run = _Run(hop, Command(()), Output(hop.name, limits, None), self._settings)
        return await self._connect(hop, limits, run)


class _Run:
    """One run's state, from which every kind of Outcome is made."""

    def __init__(self, node: Node, command: Command, output: Output, settings: SshSettings) -> None:
        self.node, self.command, self.output = node, command, output
        self.clock = PhaseClock.start()
        self.attempts = 0
        self.started_at = 0.0
        self._settings = settings
        self._begun = self.clock.since
        self._connect_seconds = 0.0

    def connected(self) -> None:
        self._connect_seconds = self.clock.now() - self._begun
        self.clock.enter(Phase.EXEC)

    def judge(self, stop: Stop, session: Session) -> Outcome:
        limits = self.command.limits
        if stop is Stop.LIMIT and session.status is None and session.signal is None:
            message = f"the command did not end within {limits.command:g} s and was stopped"
            return self.outcome(Ending.TIMEOUT, Phase.COMMAND, message)
        if stop is Stop.FLOOD:
            return self.outcome(Ending.FAILED, Phase.OUTPUT, self.output.flood())
        if session.status is None and session.signal is None:
            why = f": {session.error}" if session.error else " without telling how the command ended"
            return self.outcome(Ending.LOST, Phase.COMMAND, f"the connection was lost{why}")
        phase, message = Phase.COMMAND, ""
        if stop in (Stop.HELD, Stop.LIMIT):
            phase = Phase.OUTPUT
            message = HELD.format(limits.output)
        elif session.error is not None:
            phase = Phase.OUTPUT
            message = f"it exited, but the connection was lost before all of its output came: {session.error}"
        if session.signal is not None:
            message = message or f"the command was ended by signal {session.signal}"
            return self.outcome(Ending.SIGNAL, phase, message, signal=session.signal)
        return self.outcome(Ending.EXIT, phase, message, status=session.status)

    def outcome(
        self, ending: Ending, phase: Phase, message: str, status: int | None = None, signal: str | None = None
    ) -> Outcome:
        self.clock.stop()
        return Outcome(
            node=self.node.name,
            ending=ending,
            phase=phase,
            status=status,
            signal=signal,
            stdout=bytes(self.output.stdout),
            stderr=bytes(self.output.stderr),
            truncated=self.output.truncated,
            seconds=self.clock.now() - self._begun,
            connect_seconds=self._connect_seconds,
            attempts=max(self.attempts, 1),
            message=message,
            started_at=self.started_at,
            ended_at=self._settings.clock(),
            phase_seconds=MappingProxyType(dict(self.clock.seconds)),
        )
