"""Jump hosts: one connection for all the nodes behind each, opened once and opened again if it died."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import asyncssh

from inventory.fleet import Node
from inventory.transport import Ending, Limits, Phase
from inventory.transport.phases import PhaseError

_OPENING: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "jump hosts being opened", default=()
)

Connect = Callable[[Node, Limits], Awaitable[asyncssh.SSHClientConnection]]
"""Connects to a node, through that node's own jump host if it has one, with the retries of connecting."""


@dataclass(slots=True)
class _Hop:
    task: asyncio.Task[asyncssh.SSHClientConnection]
    failed_at: float | None = None


class JumpHosts:
    """Shared connections by the text that names them.

    Whoever comes first opens the connection and all others wait for that one attempt. A failure is remembered
    for `memory` seconds: a thousand nodes behind a dead jump host wait for it once.
    """

    def __init__(self, connect: Connect, nodes: Mapping[str, Node], memory: float) -> None:
        self._connect, self._nodes, self._memory = connect, nodes, memory
        self._hops: dict[str, _Hop] = {}

    async def reach(self, jump: str, limits: Limits) -> asyncssh.SSHClientConnection:
        """The connection of the last host of `jump`. Raises PhaseError that names the jump host."""
        if jump in _OPENING.get():
            path = " -> ".join([*_OPENING.get(), jump])
            raise PhaseError(
                Ending.FAILED, Phase.RESOLVE, f"jump hosts go round in circles: {path}", again=False
            )
        now = asyncio.get_running_loop().time
        hop = self._hops.get(jump)
        if hop is None or self._stale(hop, now()):
            hop = _Hop(asyncio.ensure_future(self._open(jump, limits)))
            self._hops[jump] = hop
        try:
            # Shielded: one node that is given up must not take the connection from the others.
            return await asyncio.shield(hop.task)
        except PhaseError as error:
            if hop.failed_at is None:
                hop.failed_at = now()
            message = (
                error.message
                if error.message.startswith("jump host")
                else f"jump host {jump}: {error.message}"
            )
            raise PhaseError(error.ending, error.phase, message, again=False) from error

    async def close(self) -> None:
        for hop in self._hops.values():
            if not hop.task.done():
                hop.task.cancel()
        await asyncio.gather(*(hop.task for hop in self._hops.values()), return_exceptions=True)
        for hop in self._hops.values():
            if not hop.task.cancelled() and hop.task.exception() is None:
                hop.task.result().close()
        self._hops.clear()

    def _stale(self, hop: _Hop, now: float) -> bool:
        if hop.failed_at is not None:
            return now - hop.failed_at > self._memory
        if not hop.task.done():
            return False
        return hop.task.cancelled() or (hop.task.exception() is None and hop.task.result().is_closed())

    async def _open(self, jump: str, limits: Limits) -> asyncssh.SSHClientConnection:
        # A task has a context of its own, which what it opens in turn inherits: the chain so far.
        _OPENING.set((*_OPENING.get(), jump))
        connection = await self._connect(hop_node(jump, self._nodes), limits)
        # Nobody reads from it while nodes come and go, so it has to notice by itself that it is dead.
        connection.set_keepalive(15, 3)
        return connection


def hop_node(jump: str, nodes: Mapping[str, Node]) -> Node:
    """The last host of ``a,b,c`` as a node that is reached through the others.

    A part that is a node's name stands for that node with all its attributes, its own jump host included.
    """
    before, _, last = jump.rpartition(",")
    if last in nodes:
        node = nodes[last]
        return Node(
            name=node.name,
            address=node.address,
            user=node.user,
            port=node.port,
            jump=before or node.jump,
            identity=node.identity,
        )
    user, _, place = last.rpartition("@")
    host, port = _host_and_port(place)
    return Node(name=host, user=user or None, port=port, jump=before or None)


def _host_and_port(place: str) -> tuple[str, int | None]:
    if place.startswith("["):
        host, _, rest = place[1:].partition("]")
        return host, int(rest[1:]) if rest[1:].isdigit() else None
    host, colon, port = place.rpartition(":")
    return (host, int(port)) if colon and port.isdigit() and ":" not in host else (place, None)
