"""This machine without SSH, every other node over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from inventory.fleet import Node
from inventory.transport import Command, OnOutput, Outcome
from inventory.transport.local import LocalTransport
from inventory.transport.settings import SshSettings

if TYPE_CHECKING:
    from inventory.transport.ssh import SshTransport


class RoutedTransport:
    """Sends each node's command the way that it asks for. SSH is loaded when the first node needs it."""

    def __init__(self, settings: SshSettings, fleet: Mapping[str, Node]) -> None:
        self._settings, self._fleet = settings, fleet
        self._local = LocalTransport(settings.clock)
        self._ssh: SshTransport | None = None

    async def __aenter__(self) -> RoutedTransport:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._local.__aexit__(*exc)
        if self._ssh is not None:
            await self._ssh.__aexit__(*exc)

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome:
        if node.local:
            return await self._local.run(node, command, on_output)
        if self._ssh is None:
            from inventory.transport.ssh import SshTransport

            self._ssh = SshTransport(self._settings, self._fleet)
        return await self._ssh.run(node, command, on_output)
