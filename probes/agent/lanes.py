"""A lane: the checks of one family, one after another, in a process replaced when one takes it down."""

import contextlib
import json
import os
import signal
import time
from typing import Any, Callable, Dict, Iterable, List, Optional

from probes.agent import process, record, vendors, worker
from probes.agent.host import Machine

NOISE = 4096
"""Bytes kept of what a check prints by itself: shown when its process dies."""


class Lane:
    """Runs `entries` as far as `allowed` lets it and gives each one's record to `done(entry, text)`."""

    def __init__(
        self,
        entries: List[Dict[str, Any]],
        present: List[str],
        nonce: str,
        done: Callable[[Dict[str, Any], str], None],
        allowed: Optional[int] = None,
    ) -> None:
        self.entries, self._present, self._nonce, self._done = entries, present, nonce, done
        self.allowed = len(entries) if allowed is None else allowed
        self.pid = 0
        self.running: Optional[Dict[str, Any]] = None
        self.deadline = 0.0
        self._started = 0.0
        self._next = 0
        self._orders = self.channel = self.noise = -1
        self._pending, self._printed = b"", b""
        self._hung: Dict[worker.Argv, str] = {}

    @property
    def idle(self) -> bool:
        return self.running is None and self._next >= self.allowed

    def descriptors(self) -> List[int]:
        return [fd for fd in (self._orders, self.channel, self.noise) if fd >= 0]

    def advance(self, now: float, close: Callable[[], Iterable[int]]) -> None:
        """Begin the next check if none runs. `close`: descriptors that a new process must not keep."""
        while self.running is None and self._next < self.allowed:
            entry = self.entries[self._next]
            self._next += 1
            refusal = absent(entry, self._present)
            if refusal is not None:
                self._done(entry, refusal)
                continue
            if not self.pid:
                self._fork(close())
            self.running, self._started = entry, now
            self.deadline = now + float(entry["timeout"])
            # A worker that died between two checks is told by the end of its channel.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._orders, b"%d\n" % (self._next - 1))
        if self.running is None and self._next >= len(self.entries) and self._orders >= 0:
            os.close(self._orders)  # The worker ends by itself.
            self._orders = -1

    def read(self, descriptor: int) -> None:
        """Take what the worker sent, or notice that it is gone."""
        data = os.read(descriptor, 65536)
        if descriptor == self.noise:
            if data:
                self._printed = (self._printed + data)[-NOISE:]
            else:
                os.close(self.noise)
                self.noise = -1
            return
        if data:
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                self._take(chr(line[0]), line[1:].decode("ascii"))
            return
        pid, entry = self.pid, self.running
        self.drain()
        ending = _ending(pid)
        if ending is None:
            process.kill_tree(pid)
            ending = "closed the channel on which it answers"
        self._forget()
        if entry is not None:
            detail = "the check's process " + ending
            self._finish(record.ended(entry["check"], "error", detail, self._seconds(), self._last_words()))

    def expire(self, now: float) -> None:
        if self.running is not None and now >= self.deadline:
            self.stop("did not end within %.6g s" % float(self.running["timeout"]))

    def stop(self, why: str) -> None:
        """Kill the worker with all that is below it; the check that ran, if any, has timed out."""
        if self.pid:
            self.drain()
            process.kill_tree(self.pid)
            self._forget()
        if self.running is not None:
            self._finish(
                record.ended(self.running["check"], "timeout", why, self._seconds(), self._last_words())
            )

    def give_up(self, why: str) -> None:
        """Stop, and answer for all checks that did not begin."""
        self.stop(why)
        while self._next < len(self.entries):
            entry = self.entries[self._next]
            self._next += 1
            self._done(entry, record.ended(entry["check"], "timeout", "not begun: " + why))

    def drain(self) -> None:
        """What the worker has printed until now."""
        if self.noise >= 0:
            os.set_blocking(self.noise, False)
            with contextlib.suppress(BlockingIOError):
                self._printed = (self._printed + os.read(self.noise, 65536))[-NOISE:]

    def _take(self, kind: str, text: str) -> None:
        if kind == "R" and self.running is not None:
            self._finish(text)
        elif kind == "H":
            hung = json.loads(text)
            self._hung[tuple(hung["argv"])] = hung["check"]

    def _finish(self, text: str) -> None:
        entry, self.running, self._printed = self.running, None, b""
        assert entry is not None
        self._done(entry, text)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _last_words(self) -> List[str]:
        lines = self._printed.decode("utf-8", "replace").splitlines()
        return [line[:500] for line in lines if line.strip()][-5:]

    def _fork(self, close: Iterable[int]) -> None:
        orders, self._orders = os.pipe()
        self.channel, channel = os.pipe()
        self.noise, noise = os.pipe()
        mine = [self._orders, self.channel, self.noise]
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in set(close) | set(mine):
                os.close(descriptor)
            worker.work(
                self.entries,
                orders=orders,
                channel=channel,
                noise=noise,
                parent=parent,
                nonce=self._nonce,
                hung=self._hung,
            )
        for descriptor in (orders, channel, noise):
            os.close(descriptor)

    def _forget(self) -> None:
        for descriptor in self.descriptors():
            os.close(descriptor)
        self._orders = self.channel = self.noise = -1
        self.pid, self._pending = 0, b""


def absent(entry: Dict[str, Any], present: List[str]) -> Optional[str]:
    """The record of a check about something that this node does not have; None if it is to be run."""
    needs = entry.get("needs") or ""
    if not needs or needs in present:
        return None
    if vendors.shown(needs, Machine()):
        return None
    if needs not in vendors.DEVICE_NODES and vendors.shown(needs, Machine()) is None:
        return record.ended(entry["check"], "error", "needs %s, which this agent does not know" % needs)
    what = "accelerator" if needs == "accelerator" else needs + " device"
    return record.ended(entry["check"], "not_applicable", "this node has no " + what)


def _ending(pid: int) -> Optional[str]:
    """How a child that seems to be gone has ended; None if it goes on."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            break
        if done and os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            try:
                return "was ended by " + signal.Signals(number).name
            except ValueError:
                return "was ended by signal %d" % number
        if done:
            return "ended with status %d" % os.WEXITSTATUS(status)
        time.sleep(0.002)
    return None
