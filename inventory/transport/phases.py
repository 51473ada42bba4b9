"""Reaching a node step by step: each phase has its own limit, its own name when it fails, its own time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from inventory.transport import Ending, Limits, Phase
from inventory.transport.settings import Address, Resolver

CONNECTING = (Phase.RESOLVE, Phase.CONNECT, Phase.BANNER, Phase.KEY_EXCHANGE, Phase.HOST_KEY, Phase.AUTH)


class PhaseError(Exception):
    """A phase did not succeed. `again`: another attempt could."""

    def __init__(self, ending: Ending, phase: Phase, message: str, again: bool | None = None) -> None:
        super().__init__(message)
        self.ending, self.phase, self.message = ending, phase, message
        self.again = ending in (Ending.REFUSED, Ending.TIMEOUT, Ending.LOST) if again is None else again


@dataclass(slots=True)
class PhaseClock:
    """Which phase it is and how long each has taken, in seconds of a monotonic clock."""

    phase: Phase
    since: float
    seconds: dict[Phase, float]
    now: Callable[[], float] = time.monotonic

    @classmethod
    def start(cls, now: Callable[[], float] = time.monotonic) -> PhaseClock:
        return cls(Phase.RESOLVE, now(), {}, now)

    def enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.stop()
            self.phase = phase

    def stop(self) -> None:
        """Book the time of the present phase."""
        at = self.now()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + at - self.since
        self.since = at


@contextlib.asynccontextmanager
async def limited(clock: PhaseClock, phase: Phase, seconds: float, what: str) -> AsyncIterator[None]:
    """Enter `phase`; passing its limit is a PhaseError that says `what` was being waited for."""
    clock.enter(phase)
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise PhaseError(Ending.TIMEOUT, phase, f"{what} within {seconds:g} s") from error


async def resolve(
    host: str, port: int, limits: Limits, clock: PhaseClock, resolver: Resolver
) -> Sequence[Address]:
    """Addresses of `host`; a literal address asks nobody."""
    clock.enter(Phase.RESOLVE)
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return [(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, (host, port))]
    async with limited(clock, Phase.RESOLVE, limits.resolve, f"no name server answered for {host}"):
        try:
            return await resolver(host, port)
        except (OSError, UnicodeError) as error:
            again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            hint = "check its spelling or give an address"
            message = f"the name {host} cannot be resolved ({_reason(error)}): {hint}"
            raise PhaseError(Ending.FAILED, Phase.RESOLVE, message, again) from error


async def dial(host: str, addresses: Sequence[Address], limits: Limits, clock: PhaseClock) -> socket.socket:
    """A connected TCP socket to the first address that answers, all of them within one limit."""
    failure: PhaseError | None = None
    async with limited(clock, Phase.CONNECT, limits.connect, f"{host} did not answer the TCP connection"):
        for family, address in addresses:
            try:
                return await _dial_one(family, address)
            except OSError as error:
                failure = _dial_failure(error, address)
    raise failure or PhaseError(Ending.FAILED, Phase.RESOLVE, f"the name {host} has no address")


async def resolve_in_a_thread(host: str, port: int) -> Sequence[Address]:
    """The system's resolver, each question in a thread of its own.

    A shared pool would let a few names that no server answers hold up every other node; the threads are
    daemons because a question cannot be taken back and must not delay the end of the program.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address]] = loop.create_future()

    def settle(addresses: list[Address], error: Exception | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(addresses)
        else:
            answer.set_exception(error)

    def ask() -> None:
        addresses: list[Address] = []
        failure: Exception | None = None
        try:
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                addresses.append((family, (str(address[0]), int(address[1]))))
        except (OSError, UnicodeError) as error:
            failure = error
        # The loop is gone when its program ended before the answer came: nobody wants it any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, addresses, failure)

    threading.Thread(target=ask, name=f"resolve {host}", daemon=True).start()
    return await answer


async def _dial_one(family: int, address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _dial_failure(error: OSError, address: tuple[str, int]) -> PhaseError:
    place = f"{address[0]} port {address[1]}"
    if isinstance(error, ConnectionRefusedError):
        message = f"{place} refused the connection: is sshd running there, and is this its port?"
        return PhaseError(Ending.REFUSED, Phase.CONNECT, message)
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN):
        message = f"{place} cannot be reached ({_reason(error)}): is the machine up and on the network?"
        return PhaseError(Ending.FAILED, Phase.CONNECT, message, again=True)
    if isinstance(error, TimeoutError):
        return PhaseError(Ending.TIMEOUT, Phase.CONNECT, f"{place} did not answer the TCP connection")
    if isinstance(error, ConnectionResetError):
        return PhaseError(Ending.LOST, Phase.CONNECT, f"{place} reset the connection")
    return PhaseError(Ending.FAILED, Phase.CONNECT, f"{place}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.strerror or error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error)
