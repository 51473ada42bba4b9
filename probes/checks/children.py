"""Work in forked children under one deadline: one that hangs, crashes or fails does not take the others'
answers.

Nothing is written to disk and no module is looked for by path: a child is a copy of this process, so this
works where the code came over a pipe. A device runtime must not have been started before the fork.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Sequence, Tuple

Say = Callable[[str], None]
Work = Callable[[Say], Any]

DONE, FAILED, BROKE, DIED, HUNG = "done", "failed", "broke", "died", "hung"
"""`failed`: RuntimeError, what torch raises for a device or its library, or OSError, what the kernel said.
`broke`: any other exception, so the check itself is at fault. `died`: ended by a signal or without an
answer."""

FIRST_FAILURE_GRACE = 5.0
"""Seconds that the rest of a group gets after one of it is lost: peers of a dead rank may wait for ever."""


class Child(NamedTuple):
    name: str
    ending: str
    result: Any
    detail: str
    phase: str
    """What it last said that it was doing."""

    @property
    def words(self) -> str:
        """Why there is no result, in one line."""
        where = " during " + self.phase if self.phase else ""
        return "%s %s%s%s" % (self.name, self.ending, where, ": " + self.detail if self.detail else "")


def run_children(works: Sequence[Tuple[str, Work]], timeout: float, group: bool = False) -> List[Child]:
    """Run each work in its own process, all at once; JSON-able results, in order, within `timeout` seconds.

    `work(say)` may name its phases by `say`. In a `group` the loss of one shortens the wait for the others.
    A child that cannot be killed at once (blocked in the kernel) is left dying, never waited for.
    """
    running: Dict[int, _Running] = {}
    order: List[_Running] = []
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for name, work in works:
            child = _start(name, work, [c.pipe for c in order])
            order.append(child)
            running[child.pipe] = child
        deadline = time.monotonic() + timeout
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            ready = select.select(list(running), [], [], left)[0]
            for pipe in ready:
                child = running[pipe]
                if child.take():
                    continue
                del running[pipe]
                if group and child.ending != DONE:
                    deadline = min(deadline, time.monotonic() + FIRST_FAILURE_GRACE)
    finally:
        for child in order:
            child.end()
    return [Child(c.name, c.ending, c.result, c.detail, c.phase) for c in order]


class _Running:
    def __init__(self, name: str, pid: int, pipe: int) -> None:
        self.name, self.pid, self.pipe = name, pid, pipe
        self.ending, self.detail, self.phase = HUNG, "", ""
        self.result: Any = None
        self._buffer = b""
        self._closed = False

    def take(self) -> bool:
        """Read what it said. False when it has nothing more to say."""
        part = os.read(self.pipe, 1 << 16)
        self._buffer += part
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            for key, value in json.loads(line.decode()).items():
                if key == "phase":
                    self.phase = value
                elif key == DONE:
                    self.ending, self.result = DONE, value
                else:
                    self.ending, self.detail = key, value
        if not part:
            self._closed = True
            if self.ending == HUNG:
                self.ending = DIED
        return bool(part)

    def end(self) -> None:
        """Kill it unless it has ended, reap it if that is possible at once, and say how it died."""
        if not self._closed:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        status = _reap(self.pid, 2.0)
        if self.ending == DIED and status is not None:
            if os.WIFSIGNALED(status):
                self.detail = "killed by signal %d" % os.WTERMSIG(status)
            else:
                self.detail = "exit status %d" % os.WEXITSTATUS(status)


def _reap(pid: int, patience: float) -> "int | None":
    deadline = time.monotonic() + patience
    while True:
        try:
            reaped, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if reaped:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def _start(name: str, work: Work, siblings: Sequence[int]) -> _Running:
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return _Running(name, pid, reader)
    return _be_the_child(work, writer, parent, [reader, *siblings])


def _be_the_child(work: Work, writer: int, parent: int, foreign: Sequence[int]) -> NoReturn:
    """Never returns into the caller's code: whatever happens, the process ends here."""

    def tell(key: str, value: Any) -> None:
        data = json.dumps({key: value}).encode() + b"\n"
        while data:
            data = data[os.write(writer, data) :]

    try:
        for pipe in foreign:
            os.close(pipe)
        _die_with(parent)
        # Libraries print what they like; the worker's own output is a wire format.
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        try:
            tell(DONE, work(lambda phase: tell("phase", phase)))
        except NotImplementedError as error:
            tell(BROKE, _words(error))
        except (RuntimeError, OSError) as error:
            tell(FAILED, _words(error))
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            tell(BROKE, "%s (%s:%s)" % (_words(error), os.path.basename(place.filename), place.lineno))
    finally:
        os._exit(0)


def _die_with(parent: int) -> None:
    set_parent_death_signal = 1
    try:
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError):
        return  # Not Linux, or no libc to ask: the process group's killer is then the only one.
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return "%s: %s" % (type(error).__name__, lines[0][:300]) if lines else type(error).__name__
