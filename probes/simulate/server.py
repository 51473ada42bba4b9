"""The servers of a simulated fleet: one listener a node; raw sockets where SSH itself misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

import asyncssh

from inventory.errors import UsageError
from probes.simulate.conversation import HangingServer, Process, Server, answer, hold, trickle
from probes.simulate.node import SimulatedNode
from probes.simulate.scenario import Behaviour

FIRST_ADDRESS = ipaddress.IPv4Address("127.101.0.1")
"""Far from 127.0.0.1, where people's own services listen."""

CONNECTIONS = 4096
"""Open files that are kept free for connections, beside one for each node's listener."""

_TRIES = 5
"""Free ports that are tried before giving up."""

_RAW: Mapping[Behaviour, Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]] = {
    Behaviour.SILENT: hold,
    Behaviour.TRICKLE: trickle,
}


@dataclass(frozen=True)
class Served:
    """A running fleet: where each node is, and the keys of both sides (OpenSSH formats)."""

    addresses: Mapping[str, str]
    """Node -> IPv4 address, or a name that does not resolve."""
    port: int
    host_key: str
    """Public key line that a known_hosts file needs."""
    client_key: bytes
    """Private key that the nodes accept."""


@contextlib.asynccontextmanager
async def serve(nodes: Mapping[str, SimulatedNode], port: int = 0) -> AsyncIterator[Served]:
    """Serve `nodes` until the context is left; what is connected then is cut off.

    With port 0 a free one is taken, the same for all nodes. Raises UsageError when an address or port
    cannot be bound, or when this process may not open as many files as the fleet needs.
    """
    _allow_files(len(nodes) + CONNECTIONS, len(nodes))
    fleet = _Fleet(nodes)
    try:
        for attempt in range(1, _TRIES + 1):
            chosen = port or _free_port()
            try:
                await fleet.listen(chosen)
                break
            except OSError as error:
                fleet.close()
                if port or error.errno != errno.EADDRINUSE or attempt == _TRIES:
                    where = f"{error.filename}:{chosen}" if error.filename else f"port {chosen}"
                    why = error.strerror or str(error)
                    raise UsageError(f"cannot listen on {where}: {why}; choose another with --port") from None
        yield Served(
            fleet.addresses, chosen, fleet.host_key_line, fleet.client_key.export_private_key("openssh")
        )
    finally:
        fleet.close()


class _Fleet:
    """Keys, listeners and connections of one fleet."""

    def __init__(self, nodes: Mapping[str, SimulatedNode]) -> None:
        self._nodes = nodes
        self._places = {name: str(FIRST_ADDRESS + index) for index, name in enumerate(nodes)}
        self._by_address = {self._places[name]: node for name, node in nodes.items()}
        self._listeners: list[asyncssh.SSHAcceptor | asyncio.Server] = []
        self._open: set[asyncssh.SSHServerConnection] = set()
        self.client_key = asyncssh.generate_private_key("ssh-ed25519")
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        self.host_key_line = host_key.export_public_key().decode().strip()
        strangers = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
        self._usual = self._options(host_key, self.client_key)
        self._special = {
            Behaviour.WRONG_HOST_KEY: self._options(strangers[0], self.client_key),
            Behaviour.AUTH_REFUSED: self._options(host_key, strangers[1]),
            Behaviour.HANG_AFTER_AUTH: self._options(host_key, self.client_key, hanging=True),
        }

    @property
    def addresses(self) -> dict[str, str]:
        return {
            name: f"{name}.invalid" if node.behaviour is Behaviour.UNRESOLVABLE else self._places[name]
            for name, node in self._nodes.items()
        }

    async def listen(self, port: int) -> None:
        """Raises OSError, with the address as its file name."""
        for name, node in self._nodes.items():
            behaviour = node.behaviour
            if behaviour in (Behaviour.REFUSE, Behaviour.UNRESOLVABLE):
                continue
            bound = _bound(self._places[name], port)
            if behaviour is not None and behaviour in _RAW:
                self._listeners.append(await asyncio.start_server(_RAW[behaviour], sock=bound))
            else:
                options = self._special.get(behaviour, self._usual) if behaviour else self._usual
                self._listeners.append(await asyncssh.listen(sock=bound, options=options))

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in list(self._open):
            connection.abort()
        self._open.clear()

    async def _answer(self, process: Process) -> None:
        await answer(self._by_address[process.get_extra_info("sockname")[0]], process)

    def _options(
        self, host_key: asyncssh.SSHKey, accepted: asyncssh.SSHKey, hanging: bool = False
    ) -> asyncssh.SSHServerConnectionOptions:
        server = HangingServer if hanging else Server
        return asyncssh.SSHServerConnectionOptions(
            server_factory=partial(server, self._open),
            server_host_keys=[host_key],
            authorized_client_keys=asyncssh.import_authorized_keys(accepted.export_public_key().decode()),
            process_factory=None if hanging else self._answer,
            encoding=None,
            allow_pty=False,
            agent_forwarding=False,
            allow_scp=False,
            login_timeout=60,
            compression_algs=["none"],
        )


def _bound(address: str, port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, address) from None
    return sock


def _allow_files(wanted: int, nodes: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < nodes + 256:
        raise UsageError(
            f"{nodes} nodes need at least {nodes + 256} open files, this process may have {hard}; "
            "raise the hard limit (ulimit -Hn) or choose fewer nodes"
        )
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((str(FIRST_ADDRESS), 0))
        port: int = probe.getsockname()[1]
        return port
