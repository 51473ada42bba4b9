"""SSH servers that misbehave, each in one way, on loopback addresses of their own."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncssh

BANNER = b"SSH-2.0-Misbehaving\r\n"


class Fault(enum.Enum):
    """What a server does; the name of each is its whole description."""

    NEVER_SENDS_A_BANNER = enum.auto()
    TRICKLES_ITS_BANNER = enum.auto()
    CLOSES_AT_ONCE = enum.auto()
    SPEAKS_AN_ANCIENT_PROTOCOL = enum.auto()
    HANGS_IN_KEY_EXCHANGE = enum.auto()
    DROPS_IN_KEY_EXCHANGE = enum.auto()
    HANGS_IN_AUTHENTICATION = enum.auto()
    REFUSES_EVERYBODY = enum.auto()
    HANGS_AFTER_AUTHENTICATION = enum.auto()
    REFUSES_THE_SESSION = enum.auto()
    REFUSES_THE_COMMAND = enum.auto()
    DROPS_IN_THE_MIDDLE = enum.auto()
    ENDS_WITHOUT_A_STATUS = enum.auto()
    EXITS_BY_SIGNAL = enum.auto()
    FLOODS = enum.auto()
    SENDS_NOISE = enum.auto()
    GOES_SILENT = enum.auto()


NOISE = bytes(range(256)) * 64 + b"\x1b[2J\x1b]0;title\x07"
LOGIN_BANNER = "*** Authorised users only ***\nLoad: 99%\x1b[31m\n"


@dataclass(frozen=True)
class Misbehaving:
    """Running servers; ``address(fault)`` is where each is."""

    port: int
    prefix: str

    def address(self, fault: Fault) -> str:
        return f"{self.prefix}.{fault.value}"


@contextlib.asynccontextmanager
async def misbehaving(
    port: int, host_key: asyncssh.SSHKey, prefix: str = "127.80.0"
) -> AsyncIterator[Misbehaving]:
    """Every fault at once. Servers that speak SSH show `host_key`, and most let everybody in."""
    async with contextlib.AsyncExitStack() as stack:
        place = Misbehaving(port, prefix)
        for fault in Fault:
            if fault in _RAW:
                connections: set[asyncio.Task[None]] = set()
                server = await asyncio.start_server(
                    _raw(_RAW[fault], connections), place.address(fault), port
                )
                stack.push_async_callback(_stop_raw, server, connections)
            else:
                acceptor = await asyncssh.create_server(
                    lambda fault=fault: _Server(fault),
                    place.address(fault),
                    port,
                    server_host_keys=[host_key],
                    encoding=None,
                    login_timeout=0,
                )
                stack.callback(acceptor.close)
        yield place


_Raw = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in BANNER * 10:
        writer.write(bytes([byte]) if byte not in b"\r\n" else b"-")
        await writer.drain()
        await asyncio.sleep(0.2)


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    return


async def _ancient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-1.0-ancient\r\n")
    await writer.drain()
    await reader.read(100)


async def _hang_in_kex(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BANNER)
    await asyncio.Event().wait()


async def _drop_in_kex(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(BANNER)
    # The client's version line and its key exchange proposal, then the cable is gone.
    await reader.read(1 << 16)
    writer.transport.abort()


_RAW: dict[Fault, _Raw] = {
    Fault.NEVER_SENDS_A_BANNER: _silent,
    Fault.TRICKLES_ITS_BANNER: _trickle,
    Fault.CLOSES_AT_ONCE: _close,
    Fault.SPEAKS_AN_ANCIENT_PROTOCOL: _ancient,
    Fault.HANGS_IN_KEY_EXCHANGE: _hang_in_kex,
    Fault.DROPS_IN_KEY_EXCHANGE: _drop_in_kex,
}


def _raw(serve: _Raw, connections: set[asyncio.Task[None]]) -> Any:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            connections.discard(task)
            writer.close()

    return handle


async def _stop_raw(server: asyncio.Server, connections: set[asyncio.Task[None]]) -> None:
    server.close()
    for task in list(connections):
        task.cancel()


class _Server(asyncssh.SSHServer):
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._connection: Any = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    async def begin_auth(self, username: str) -> bool:
        if self._fault is Fault.SENDS_NOISE:
            self._connection.send_auth_banner(LOGIN_BANNER)
        if self._fault is Fault.HANGS_IN_AUTHENTICATION:
            await asyncio.Event().wait()
        return self._fault is Fault.REFUSES_EVERYBODY

    def public_key_auth_supported(self) -> bool:
        return True

    def session_requested(self) -> Any:
        if self._fault is Fault.HANGS_AFTER_AUTHENTICATION:
            return self._never()
        if self._fault is Fault.REFUSES_THE_SESSION:
            return False
        return _Session(self._fault)

    async def _never(self) -> Any:
        await asyncio.Event().wait()


class _Session(asyncssh.SSHServerSession[bytes]):
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._channel: Any = None
        self._paused = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def exec_requested(self, command: str) -> bool:
        return self._fault is not Fault.REFUSES_THE_COMMAND

    def session_started(self) -> None:
        self._sender = asyncio.ensure_future(self._misbehave())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sender is not None:
            self._sender.cancel()

    def pause_writing(self) -> None:
        self._paused.set()

    def resume_writing(self) -> None:
        self._paused.clear()

    async def _misbehave(self) -> None:
        channel = self._channel
        match self._fault:
            case Fault.DROPS_IN_THE_MIDDLE:
                channel.write(b"the first half")
                await asyncio.sleep(0.05)
                channel.get_connection().abort()
            case Fault.ENDS_WITHOUT_A_STATUS:
                channel.write(b"all of it")
                channel.close()
            case Fault.EXITS_BY_SIGNAL:
                channel.write(b"before the end")
                channel.exit_with_signal("SEGV", True, "core dumped")
            case Fault.SENDS_NOISE:
                channel.write(NOISE)
                channel.write_stderr(NOISE)
                channel.exit(0)
            case Fault.FLOODS:
                while not channel.is_closing():
                    channel.write(b"x" * 65536)
                    await asyncio.sleep(0)
                    while self._paused.is_set():
                        await asyncio.sleep(0.001)
            case _:
                await asyncio.Event().wait()
