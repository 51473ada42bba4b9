"""What a simulated node does with one connection and one command. Nothing that is sent to it is executed."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Iterator

import asyncssh

from inventory.transport.watchdog import LOGIN_LINE
from probes.simulate.node import BadPayload, SimulatedNode
from probes.simulate.scenario import Behaviour

Process = asyncssh.SSHServerProcess[bytes]

_NOISE = bytes(range(256)) * 8 + b"\r\n*** AUTHORISED USE ONLY ***\r\n\x1b[2J"
_FLOOD_PIECE = b"x" * 65535 + b"\n"
_FLOOD_PIECES = 1 << 14
_TRICKLE = b"SSH-2.0-" + b"o" * 200
"""The protocol allows 255 bytes of version; nobody waits that long."""


async def answer(node: SimulatedNode, process: Process) -> None:
    """Answer one command as `node` would. A connection that the other side gives up ends it silently."""
    with contextlib.suppress(asyncssh.Error, OSError, asyncio.IncompleteReadError):
        match node.behaviour:
            case Behaviour.NO_PYTHON:
                process.stderr.write(b"sh: 1: python3: not found\n")
                process.exit(127)
            case Behaviour.FORCED_COMMAND:
                process.stdout.write(b"This account may only submit jobs.\n")
                process.exit(1)
            case Behaviour.HANG_IN_COMMAND:
                await process.wait_closed()
            case Behaviour.FLOOD:
                for _ in range(_FLOOD_PIECES):
                    process.stdout.write(_FLOOD_PIECE)
                    await process.stdout.drain()
                process.exit(0)
            case _:
                await _run(node, process)


async def _run(node: SimulatedNode, process: Process) -> None:
    words = await _asked(process)
    if not _is_agent(words):
        process.exit(0 if "true" in words else 127)
        return
    if node.behaviour is Behaviour.NOISE:
        process.stdout.write(_NOISE)
    nonce, size = words[-2], int(words[-1])
    payload = await process.stdin.readexactly(size)
    try:
        frames = node.frames(nonce, payload, time.time())
    except BadPayload as error:
        process.stderr.write(f"ltp agent: the payload cannot be used: {error}\n".encode())
        process.exit(1)
        return
    if node.seconds and await _stdin_ends(process, node.seconds):
        # The agent dies when the other side is gone.
        process.exit(1)
        return
    match node.behaviour:
        case Behaviour.DROP:
            process.stdout.write(b"".join(frames[: len(frames) // 2]))
            await process.stdout.drain()
            process.channel.get_connection().abort()
        case Behaviour.KILLED:
            process.stdout.write(b"".join(frames[: len(frames) // 2]))
            process.exit_with_signal("KILL", msg="killed")
        case _:
            process.stdout.write(b"".join(frames))
            process.exit(0)


async def _stdin_ends(process: Process, seconds: float) -> bool:
    """Wait so long; True as soon as the other side closes its end."""
    try:
        async with asyncio.timeout(seconds):
            while await process.stdin.read(4096):
                pass
        return True
    except TimeoutError:
        return False


async def _asked(process: Process) -> list[str]:
    """The command; where a shell is asked to read it as its first line of input, that line."""
    command = process.command or ""
    text = command if isinstance(command, str) else command.decode("utf-8", "replace")
    if text == LOGIN_LINE:
        text = (await process.stdin.readline()).decode("utf-8", "replace")
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _is_agent(words: list[str]) -> bool:
    """Whether this is the probe agent's command line: ``... -c PROGRAM NONCE SIZE``."""
    return len(words) >= 5 and words[-4] == "-c" and words[-1].isascii() and words[-1].isdigit()


class Server(asyncssh.SSHServer):
    """The SSH side of one connection, which is in `connections` while it lives."""

    def __init__(self, connections: set[asyncssh.SSHServerConnection]) -> None:
        self._connections = connections
        self._mine: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._mine = conn
        self._connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._mine is not None:
            self._connections.discard(self._mine)


class HangingServer(Server):
    """Lets in, and then neither opens a session nor refuses it."""

    _never: asyncio.Future[asyncssh.SSHServerSession[bytes]] | None = None

    def session_requested(self) -> asyncio.Future[asyncssh.SSHServerSession[bytes]]:
        self._never = asyncio.get_running_loop().create_future()
        return self._never

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._never is not None:
            # Else asyncio complains of a task that waits for what nobody has any more.
            self._never.cancel()


async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept, say nothing, until the other side leaves."""
    with _until_the_end(writer):
        while await reader.read(4096):
            pass


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a banner that never becomes one, a byte a second."""
    with _until_the_end(writer):
        for byte in _TRICKLE:
            # The other side may have left during the last second.
            if reader.at_eof() or writer.is_closing():
                break
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)


@contextlib.contextmanager
def _until_the_end(writer: asyncio.StreamWriter) -> Iterator[None]:
    # The fleet's end cancels these tasks, and asyncio would print that as an error of theirs.
    # A connection that was lost while it was being written to is the other side's end (uvloop: RuntimeError).
    with contextlib.suppress(OSError, RuntimeError, asyncio.CancelledError):
        yield
    writer.close()
