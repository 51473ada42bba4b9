"""What a command has written so far, within its caps."""

from __future__ import annotations

import enum

from inventory.transport import Limits, OnOutput


class Stop(enum.Enum):
    """What ended the wait for a command."""

    CLOSED = "closed"
    LIMIT = "limit"
    FLOOD = "flood"
    HELD = "held"
    """The command has exited, but something still holds its output open."""


HELD = "it exited, but something that it started held its output open for {:g} s more"
"""What to say after Stop.HELD, with the output limit."""


class Output:
    """Keeps the head of stdout and of stderr, and says when more would be a flood.

    Without a listener nobody wants what lies past the cap of stdout, so the command is to be stopped
    there. Noise on stderr is dropped past its cap but stops nothing until it amounts to as much as stdout
    may hold: a chatty driver must not cost the answer. With a listener (a stream of days) nothing is stopped.
    """

    def __init__(self, node: str, limits: Limits, on_output: OnOutput | None) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self.truncated = False
        self._node, self._limits, self._on_output = node, limits, on_output
        self._dropped_noise = 0

    def take(self, data: bytes, stderr: bool = False) -> bool:
        """Keep what fits; False when the command floods and has to be stopped."""
        if stderr:
            self._dropped_noise += self._keep(self.stderr, data, self._limits.stderr_bytes)
            return self._on_output is not None or self._dropped_noise <= self._limits.stdout_bytes
        if self._on_output is not None:
            self._on_output(self._node, data)
        dropped = self._keep(self.stdout, data, self._limits.stdout_bytes)
        return not dropped or self._on_output is not None

    def flood(self) -> str:
        """One line for the outcome of a command that was stopped for its output."""
        stream, cap = ("stdout", self._limits.stdout_bytes)
        if len(self.stdout) < cap:
            stream, cap = "stderr", self._limits.stderr_bytes + self._limits.stdout_bytes
        return f"stopped: it wrote more than {cap} bytes to {stream}; the first part is kept"

    def _keep(self, kept: bytearray, data: bytes, cap: int) -> int:
        room = cap - len(kept)
        if len(data) <= room:
            kept += data
            return 0
        kept += data[: max(room, 0)]
        self.truncated = True
        return len(data) - max(room, 0)
