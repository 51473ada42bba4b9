"""The SSH handshake with its phases told apart: banner, key exchange, host key, authentication.

asyncssh has one limit for everything and reports most failures as one kind of exception. Here the connection
object tells when the server's banner has arrived and when authentication begins and ends, a timer follows
it, and what ended the handshake is named by the phase that it ended in.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import asyncssh

from inventory.transport import Ending, Limits, Phase
from inventory.transport.known_hosts import KnownHosts, Trust, fingerprint
from inventory.transport.phases import PhaseClock, PhaseError, limited
from inventory.transport.ssh_options import Target


async def shake_hands(
    target: Target,
    way: socket.socket | asyncssh.SSHClientConnection,
    limits: Limits,
    clock: PhaseClock,
    accept_new: bool,
) -> asyncssh.SSHClientConnection:
    """An authenticated connection over a connected socket, or through a jump host's connection.

    Raises PhaseError. On any exception nothing of the connection is left.
    """
    loop = asyncio.get_running_loop()
    watcher = _Watcher(target, limits, clock, accept_new, loop)
    options: Any = target.options
    options.waiter = loop.create_future()
    options.protocol_factory = lambda: watcher
    options.known_hosts = watcher.trusted_keys
    connection = _Connection(watcher, loop, options, wait="auth")
    try:
        if isinstance(way, socket.socket):
            await loop.create_connection(lambda: connection, sock=way)
        else:
            await _through(way, connection, target, limits, clock)
        await options.waiter
    except (asyncssh.Error, OSError) as error:
        raise watcher.failure(error) from error
    finally:
        watcher.done()
        if not watcher.authenticated:
            connection.abort()
            options.waiter.cancel()
    if not watcher.authenticated:
        raise watcher.failure(None)
    return connection


async def _through(
    jump: asyncssh.SSHClientConnection,
    connection: asyncssh.SSHClientConnection,
    target: Target,
    limits: Limits,
    clock: PhaseClock,
) -> None:
    place = f"{target.host} port {target.port}"
    factory: Any = lambda: connection  # noqa: E731
    async with limited(clock, Phase.CONNECT, limits.connect, f"the jump host did not get through to {place}"):
        try:
            await jump.create_connection(factory, target.host, target.port)
        except asyncssh.ChannelOpenError as error:
            if jump.is_closed():
                message = "the connection to the jump host was lost"
                raise PhaseError(Ending.LOST, Phase.CONNECT, message) from error
            refused = "refused" in error.reason.lower()
            message = f"the jump host cannot connect to {place}: {error.reason}"
            ending = Ending.REFUSED if refused else Ending.FAILED
            raise PhaseError(ending, Phase.CONNECT, message) from error


class _Watcher(asyncssh.SSHClient):
    """Follows one handshake, holds each phase to its limit, and judges the host key."""

    def __init__(
        self,
        target: Target,
        limits: Limits,
        clock: PhaseClock,
        accept_new: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.authenticated = False
        self._target, self._limits, self._clock = target, limits, clock
        self._accept_new, self._loop = accept_new, loop
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._refusal = ""
        self._abort: Callable[[], None] = lambda: None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self._abort = conn.abort
        self._enter(Phase.BANNER, self._limits.banner)

    def banner_received(self) -> None:
        if self._clock.phase is Phase.BANNER:
            self._enter(Phase.KEY_EXCHANGE, self._limits.handshake)

    def begin_auth(self, username: str) -> None:
        self._enter(Phase.AUTH, self._limits.auth)

    def auth_completed(self) -> None:
        self.authenticated = True
        self.done()

    def done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def trusted_keys(self, host: str, addr: str, port: int | None) -> tuple[list[Any], list[Any], list[Any]]:
        """Keys, authorities and revoked keys, as asyncssh asks for them: it negotiates their types."""
        entries = self._target.known_hosts.entries(self._names(addr), port or 22)
        kinds: dict[str, list[Any]] = {"": [], "cert-authority": [], "revoked": []}
        for entry in entries:
            try:
                kinds[entry.marker].append(asyncssh.import_public_key(entry.key))
            except asyncssh.KeyImportError:
                # A type that asyncssh does not speak (sk- keys of some kinds): others may be there.
                continue
        return kinds[""], kinds["cert-authority"], kinds["revoked"]

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Asked only about keys that are not among the trusted ones."""
        text = " ".join(key.export_public_key("openssh").decode().split()[:2])
        known, names = self._target.known_hosts, self._names(addr)
        judgement = known.judge(names, port, text)
        if judgement.trust is Trust.UNKNOWN and self._accept_new:
            judgement = known.learn(names, port, text)
        place = judgement.entry.place if judgement.entry else "known_hosts"
        match judgement.trust:
            case Trust.KNOWN:
                return True
            case Trust.UNKNOWN:
                self._refusal = _unknown(self._target, text, known)
            case Trust.REVOKED:
                self._refusal = f"the host key is revoked by {place}"
            case Trust.CHANGED:
                file = judgement.entry.file if judgement.entry else "known_hosts"
                shown = f"{key.get_algorithm()} {fingerprint(text)}"
                self._refusal = (
                    f"the host key has CHANGED: it is now {shown}, but {place} says otherwise; "
                    f"if the machine was reinstalled: ssh-keygen -f {file} -R {_in_file(self._target)}"
                )
        return False

    def failure(self, error: Exception | None) -> PhaseError:
        """What ended the handshake, by the phase that it was in."""
        if isinstance(error, PhaseError):
            return error
        place, phase = f"{self._target.host} port {self._target.port}", self._clock.phase
        if self._expired:
            return PhaseError(
                Ending.TIMEOUT, phase, _LATE[phase].format(place=place, limit=self._limit(phase))
            )
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            self._clock.enter(Phase.HOST_KEY)
            return PhaseError(Ending.REJECTED, Phase.HOST_KEY, self._refusal or str(error))
        if isinstance(error, asyncssh.PermissionDenied):
            message = (
                f"{place} refused to let {self._target.user} in: "
                "no key, agent or certificate that it accepts (this tool types no passwords)"
            )
            return PhaseError(Ending.REJECTED, Phase.AUTH, message)
        if isinstance(error, asyncssh.KeyExchangeFailed):
            hint = "(a BMC or an old server? use its console)"
            message = f"no common way to speak SSH with {place}: {error.reason} {hint}"
            return PhaseError(Ending.FAILED, phase, message)
        if phase is Phase.BANNER and isinstance(
            error, asyncssh.ProtocolError | asyncssh.ProtocolNotSupported
        ):
            return PhaseError(Ending.FAILED, phase, f"{place} does not speak SSH: {error.reason}")
        if isinstance(error, asyncssh.ConnectionLost) or not isinstance(error, asyncssh.Error):
            return PhaseError(Ending.LOST, phase, f"{place} {_LOST[phase]}")
        if phase is Phase.AUTH:
            return PhaseError(Ending.REJECTED, phase, f"{place} ended the authentication: {error.reason}")
        return PhaseError(Ending.FAILED, phase, f"{place}: {error.reason}")

    def _enter(self, phase: Phase, limit: float) -> None:
        self._clock.enter(phase)
        self.done()
        self._timer = self._loop.call_later(limit, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self._abort()

    def _limit(self, phase: Phase) -> str:
        limits = {Phase.BANNER: self._limits.banner, Phase.AUTH: self._limits.auth}
        return f"{limits.get(phase, self._limits.handshake):g} s"

    def _names(self, addr: str) -> tuple[str, ...]:
        names = self._target.host_key_names
        return (
            names
            if len(names) == 1 and names[0] != self._target.host
            else tuple(dict.fromkeys((*names, addr)))
        )


class _Connection(asyncssh.SSHClientConnection):
    """asyncssh's connection, which also tells when the server's version line has come."""

    def __init__(self, watcher: _Watcher, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watcher: _Watcher | None = watcher

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        super().data_received(data, datatype)
        if self._watcher is not None and self.get_extra_info("server_version"):
            self._watcher.banner_received()
            self._watcher = None


def _unknown(target: Target, key: str, known: KnownHosts) -> str:
    file = known.files[0] if known.files else "known_hosts"
    shown = f"{key.split(maxsplit=1)[0]} {fingerprint(key)}"
    return (
        f"the host key ({shown}) is not in {file}: check the fingerprint and add it "
        f"(ssh-keyscan -p {target.port} {target.host}), or run once with --accept-new"
    )


def _in_file(target: Target) -> str:
    name = target.host_key_names[0]
    return name if target.port == 22 else f"'[{name}]:{target.port}'"


_LATE = {
    Phase.CONNECT: "{place} did not answer within {limit}",
    Phase.BANNER: "{place} took the connection but sent no SSH banner within {limit}: does sshd hang?",
    Phase.KEY_EXCHANGE: "{place} did not finish the key exchange within {limit}",
    Phase.HOST_KEY: "{place} did not finish the key exchange within {limit}",
    Phase.AUTH: "{place} did not decide on the authentication within {limit}: does its directory hang?",
}

_LOST = {
    Phase.CONNECT: "closed the connection",
    Phase.BANNER: "closed the connection before its SSH banner: too many at once (MaxStartups), or not sshd",
    Phase.KEY_EXCHANGE: "closed the connection during the key exchange",
    Phase.HOST_KEY: "closed the connection during the key exchange",
    Phase.AUTH: "closed the connection during the authentication",
}
