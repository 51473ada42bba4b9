"""SIGTERM, SIGINT and SIGUSR1, noticed even while the main thread sits in a collective.

Python runs a signal's handler in the main thread between two instructions, hence not before a collective or a
kernel returns. But the interpreter's C handler writes the signal's number to a file descriptor at once, in
whichever thread the signal arrives; a thread that reads it acts.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType


class Signals:
    """Made and closed in the main thread. The functions run in a thread of their own, one after another."""

    def __init__(self, actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
        self._actions = dict(actions)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _nothing) for number in self._actions}
        self._owner = os.getpid()
        # A forked child shares the descriptor: what is sent to it must not look as if sent to us.
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._watch, name="checkpoint-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Put back what was there before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)
        self._write = -1
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while data := os.read(self._read, 64):
            for number in data:
                action = self._actions.get(signal.Signals(number))
                if action is not None:
                    action()

    def _forget(self) -> None:
        if self._write >= 0 and os.getpid() != self._owner:
            signal.set_wakeup_fd(-1)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Only its being installed matters: the default would end the process."""
