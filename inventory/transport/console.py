"""Consoles: BMCs, switches and other SSH servers that asyncssh is too strict for (paramiko).

Blocking, one connection at a time: call it from a thread. It asks for passwords by a callback, follows
prompts, and speaks old algorithms only where the console says so. Host keys are as strict as everywhere.

    with Console(ConsolePlace("10.9.1.9", user="ADMIN", old=True), password_of(node.bmc)) as console:
        print(console.run("power status", prompt=r"-> $"))
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko

from inventory.errors import UsageError
from inventory.fleet import Bmc
from inventory.transport import Ending, Limits, Phase
from inventory.transport.console_transport import WEAK, ConsoleTransport, OldTransport
from inventory.transport.known_hosts import KnownHosts, Trust, fingerprint
from inventory.transport.phases import PhaseError

Answer = Callable[[str], str]
"""From the server's prompt (``Password: ``) to what is typed. Its result is never kept or shown."""

_MOST_KEPT = 1 << 20
"""Bytes that `read_until` holds while it waits; what came earlier is dropped."""


@dataclass(frozen=True, slots=True)
class ConsolePlace:
    """Where a console is and how it is spoken to."""

    host: str
    user: str
    port: int = 22
    old: bool = False
    """Allow SHA-1 key exchange and signatures, CBC and 3DES: for firmware that has nothing better."""
    known_hosts: tuple[str, ...] = ("~/.ssh/known_hosts",)
    accept_new: bool = False
    limits: Limits = field(default_factory=Limits)


def password_of(bmc: Bmc) -> Answer:
    """Answers with the password that `bmc` names. Raises UsageError when there is none to be had."""

    def answer(prompt: str) -> str:
        if bmc.password_env is not None:
            if bmc.password_env not in os.environ:
                raise UsageError(f"BMC {bmc.address}: the environment variable {bmc.password_env} is not set")
            return os.environ[bmc.password_env]
        if bmc.password_file is not None:
            try:
                return Path(bmc.password_file).expanduser().read_text(encoding="utf-8").rstrip("\n")
            except OSError as error:
                raise UsageError(f"BMC {bmc.address}: {bmc.password_file}: {error.strerror}") from error
        raise UsageError(f"BMC {bmc.address}: no password: give password_env or password_file")

    return answer


class Console:
    """One connection. Entering connects; PhaseError says how far that got."""

    def __init__(self, place: ConsolePlace, password: Answer) -> None:
        self._place, self._password = place, password
        self._transport: paramiko.Transport | None = None
        self._shell: paramiko.Channel | None = None
        self._unread = b""

    def __enter__(self) -> Console:
        sock = _dial(self._place)
        try:
            self._transport = _handshake(self._place, sock)
            _log_in(self._place, self._transport, self._password)
        except BaseException:
            self.close()
            sock.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def send(self, text: str) -> None:
        """Type `text` as it is; a line ends with ``\\r``."""
        self._interactive().sendall(text.encode())

    def read_until(self, pattern: str, seconds: float | None = None) -> str:
        """What the console wrote up to and including the first match of `pattern` (a regular expression;
        ``$`` is the end of what has come so far).

        Raises PhaseError: TIMEOUT with the last line that came, LOST if the console hung up.
        """
        wanted = re.compile(pattern.encode())
        limit = self._place.limits.command if seconds is None else seconds
        deadline = time.monotonic() + limit
        shell = self._interactive()
        while True:
            match = wanted.search(self._unread)
            if match is not None:
                read, self._unread = self._unread[: match.end()], self._unread[match.end() :]
                return read.decode("utf-8", "replace")
            left = deadline - time.monotonic()
            if left <= 0:
                what = f"no {pattern!r} within {limit:g} s; last: {self._last_line()!r}"
                message = f"console {self._place.host}: {what}"
                raise PhaseError(Ending.TIMEOUT, Phase.COMMAND, message, again=False)
            shell.settimeout(left)
            try:
                data = shell.recv(65536)
            except TimeoutError:
                continue
            if not data:
                message = f"console {self._place.host} hung up; last: {self._last_line()!r}"
                raise PhaseError(Ending.LOST, Phase.COMMAND, message, again=False)
            self._unread = (self._unread + data)[-_MOST_KEPT:]

    def run(self, line: str, prompt: str, seconds: float | None = None) -> str:
        """Type a line at the prompt; what came before the next prompt, without the echo."""
        if self._shell is None:
            self.read_until(prompt, seconds)
        self.send(line + "\r")
        text = self.read_until(prompt, seconds).replace("\r\n", "\n").replace("\r", "\n")
        prompts = [match.start() for match in re.finditer(prompt, text)]
        text = text[: prompts[-1]] if prompts else text
        first, _, rest = text.partition("\n")
        return (rest if first.strip() == line.strip() else text).strip("\n")

    def execute(self, command: str) -> tuple[int, bytes, bytes]:
        """Exit status, stdout and stderr of a command, for servers that take one without a shell's prompt.

        Raises PhaseError when it passes the command limit or ends without a status.
        """
        limits, host = self._place.limits, self._place.host
        channel = self._session()
        deadline = time.monotonic() + limits.command
        out, err = bytearray(), bytearray()
        try:
            channel.exec_command(command)
            while not (channel.exit_status_ready() and channel.eof_received and not channel.recv_ready()):
                if time.monotonic() > deadline:
                    message = f"console {host}: {command!r} did not end within {limits.command:g} s"
                    raise PhaseError(Ending.TIMEOUT, Phase.COMMAND, message, again=False)
                _drain(channel, out, err, limits)
                if channel.closed and not channel.recv_ready():
                    break
            _drain(channel, out, err, limits)
            status = channel.exit_status
        except paramiko.SSHException as error:
            raise PhaseError(Ending.LOST, Phase.COMMAND, f"console {host}: {error}", again=False) from error
        finally:
            channel.close()
        if status < 0:
            message = f"console {host}: {command!r} ended without an exit status"
            raise PhaseError(Ending.LOST, Phase.COMMAND, message, again=False)
        return status, bytes(out), bytes(err)

    def _session(self) -> paramiko.Channel:
        if self._transport is None:
            raise RuntimeError("the console is not connected: use it as a context manager")
        try:
            return self._transport.open_session(timeout=self._place.limits.exec)
        except paramiko.SSHException as error:
            message = f"console {self._place.host} refuses a session: {error}"
            raise PhaseError(Ending.REJECTED, Phase.EXEC, message) from error

    def _interactive(self) -> paramiko.Channel:
        if self._shell is None:
            self._shell = self._session()
            # vt100 and a wide line: consoles wrap echoes at the width, which would break up what was typed.
            self._shell.get_pty(term="vt100", width=500, height=1000)
            self._shell.invoke_shell()
        return self._shell

    def _last_line(self) -> str:
        lines = self._unread.decode("utf-8", "replace").strip().splitlines()
        return lines[-1][-200:] if lines else ""


def _dial(place: ConsolePlace) -> socket.socket:
    where = f"console {place.host} port {place.port}"
    try:
        return socket.create_connection((place.host, place.port), timeout=place.limits.connect)
    except ConnectionRefusedError as error:
        raise PhaseError(Ending.REFUSED, Phase.CONNECT, f"{where} refused the connection") from error
    except socket.gaierror as error:
        raise PhaseError(Ending.FAILED, Phase.RESOLVE, f"{where}: {error.strerror}", again=False) from error
    except TimeoutError as error:
        message = f"{where} did not answer within {place.limits.connect:g} s"
        raise PhaseError(Ending.TIMEOUT, Phase.CONNECT, message) from error
    except OSError as error:
        raise PhaseError(Ending.FAILED, Phase.CONNECT, f"{where}: {error.strerror}", again=True) from error


def _handshake(place: ConsolePlace, sock: socket.socket) -> paramiko.Transport:
    known = KnownHosts(place.known_hosts)
    transport = OldTransport(sock) if place.old else ConsoleTransport(sock, disabled_algorithms=WEAK)
    transport.banner_timeout = place.limits.banner
    transport.auth_timeout = place.limits.auth
    _ask_for_known_types(place, known, transport)
    where = f"console {place.host} port {place.port}"
    try:
        transport.start_client(timeout=place.limits.banner + place.limits.handshake)
        _judge(place, known, transport.get_remote_server_key())
    except paramiko.ssh_exception.IncompatiblePeer as error:
        hint = "" if place.old else "; old firmware? allow old algorithms for this console"
        raise PhaseError(Ending.FAILED, Phase.KEY_EXCHANGE, f"{where}: {error}{hint}", again=False) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        phase = Phase.BANNER if "banner" in str(error).lower() else Phase.KEY_EXCHANGE
        late = "timeout" in str(error).lower() or "banner" in str(error).lower()
        ending = Ending.TIMEOUT if late else Ending.LOST
        raise PhaseError(ending, phase, f"{where}: {error or 'it closed the connection'}") from error
    except BaseException:
        transport.close()
        raise
    return transport


def _ask_for_known_types(place: ConsolePlace, known: KnownHosts, transport: paramiko.Transport) -> None:
    """Without this a server with several keys may show one that the file lacks, and look changed."""
    types = {
        entry.key.split(maxsplit=1)[0]
        for entry in known.entries([place.host], place.port)
        if not entry.marker
    }
    if "ssh-rsa" in types:
        types |= {"rsa-sha2-512", "rsa-sha2-256"}
    options: Any = transport.get_security_options()
    chosen = [name for name in options.key_types if name in types]
    if chosen:
        options.key_types = chosen


def _judge(place: ConsolePlace, known: KnownHosts, key: paramiko.PKey) -> None:
    text = f"{key.get_name()} {key.get_base64()}"
    judgement = known.judge([place.host], place.port, text)
    if judgement.trust is Trust.UNKNOWN and place.accept_new:
        judgement = known.learn([place.host], place.port, text)
    if judgement.trust is Trust.KNOWN:
        return
    said = f"; {judgement.entry.place} says otherwise" if judgement.entry else ""
    what = {Trust.UNKNOWN: "not known", Trust.CHANGED: "CHANGED", Trust.REVOKED: "revoked"}[judgement.trust]
    message = f"console {place.host}: its host key {key.get_name()} {fingerprint(text)} is {what}{said}"
    raise PhaseError(Ending.REJECTED, Phase.HOST_KEY, message)


def _log_in(place: ConsolePlace, transport: paramiko.Transport, password: Answer) -> None:
    """By keyboard-interactive if the server has it, else by password: old consoles have one or the other."""
    where = f"console {place.host}"
    try:
        try:
            transport.auth_interactive(
                place.user, lambda title, text, fields: [password(prompt) for prompt, _ in fields]
            )
        except paramiko.BadAuthenticationType as offered:
            if "password" not in offered.allowed_types:
                raise
            transport.auth_password(place.user, password("Password: "), fallback=False)
    except paramiko.BadAuthenticationType as error:
        message = f"{where} offers only {', '.join(error.allowed_types)} to log in, not a password"
        raise PhaseError(Ending.REJECTED, Phase.AUTH, message) from error
    except paramiko.AuthenticationException as error:
        late = "timeout" in str(error).lower()
        message = f"{where} {'did not decide on' if late else 'refused'} the login of {place.user}"
        raise PhaseError(Ending.TIMEOUT if late else Ending.REJECTED, Phase.AUTH, message) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise PhaseError(Ending.LOST, Phase.AUTH, f"{where}: lost while logging in: {error}") from error
    if not transport.is_authenticated():
        raise PhaseError(Ending.REJECTED, Phase.AUTH, f"{where} wants more than a password from {place.user}")


def _drain(channel: paramiko.Channel, out: bytearray, err: bytearray, limits: Limits) -> None:
    channel.settimeout(0.1)
    try:
        data = channel.recv(65536)
        out += data[: max(limits.stdout_bytes - len(out), 0)]
    except TimeoutError:
        data = b""
    while channel.recv_stderr_ready():
        err += channel.recv_stderr(65536)[: max(limits.stderr_bytes - len(err), 0)]
