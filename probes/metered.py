"""A transport whose commands are stopped when their listener has had enough."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from inventory.fleet import Node
from inventory.transport import Command, Ending, OnOutput, Outcome, Phase, Transport

Listener = Callable[[str, bytes], bool]
"""Called with (node name, bytes); False: no more of this node is wanted."""


class MeteredTransport:
    """Hands every byte of stdout to `listener`. A command of which it wants no more ends as FAILED in OUTPUT.

    The transports themselves stop nothing that is listened to, since a listener may follow a stream for days.
    """

    def __init__(self, inner: Transport, listener: Listener) -> None:
        self._inner, self._listener = inner, listener

    async def __aenter__(self) -> MeteredTransport:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._inner.__aexit__(*exc)

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        enough = False

        def take(name: str, data: bytes) -> None:
            nonlocal enough
            if not enough and not self._listener(name, data):
                enough = True
                task.cancel()
            if on_output is not None:
                on_output(name, data)

        try:
            outcome = await self._inner.run(node, command, take)
        except asyncio.CancelledError as cancelled:
            # Somebody else's interruption, perhaps at the same moment, is not ours to swallow.
            if not enough or task.uncancel() > 0:
                raise
            stopped = getattr(cancelled, "outcome", None)
            outcome = (
                stopped if isinstance(stopped, Outcome) else Outcome(node.name, Ending.FAILED, Phase.OUTPUT)
            )
        return (
            replace(outcome, ending=Ending.FAILED, phase=Phase.OUTPUT, truncated=True) if enough else outcome
        )
