"""The process that runs one lane's checks: told which, it answers with records. Anything may kill it."""

import gc
import importlib
import os
import resource
import sys
import time
from typing import Any, Dict, List, NoReturn, Sequence, Tuple

from probes.agent import process, record
from probes.agent.api import Ran, TimedOut
from probes.agent.host import Machine

LIGHT_MEMORY = 2 << 30
"""Bytes of address space of a worker that runs checks which load nothing; commands are not bound by it."""

Argv = Tuple[str, ...]


class Commands:
    """Runs the lane's commands: each once, its answer kept; none again that is known to hang."""

    def __init__(self, env: Dict[str, str], hung: Dict[Argv, str], channel: int) -> None:
        self.check, self.deadline, self.limit = "", 0.0, 0.0
        self._env, self._hung, self._channel = env, hung, channel
        self._kept: Dict[Argv, Any] = {}

    def begin(self, check: str, limit: float) -> None:
        """The check's own end comes a little before the agent's, so that it can still say what hung."""
        self.check, self.limit = check, limit
        self.deadline = time.monotonic() + limit - min(0.2, 0.1 * limit)

    def __call__(self, argv: Sequence[str], timeout: float) -> Ran:
        key = tuple(argv)
        known = known_to_hang(key, self._hung)
        if known:
            raise TimedOut(known)
        if key not in self._kept:
            seconds = min(timeout, self.deadline - time.monotonic())
            if seconds <= 0:
                raise TimedOut("no time was left for " + process.shown(key))
            try:
                self._kept[key] = process.run(key, seconds, self._env)
            except TimedOut:
                # Given only the tail of the check's time, being late proves nothing about the command.
                if seconds >= min(timeout, 0.5 * self.limit):
                    self._hung[key] = self.check
                    tell(self._channel, "H", record.encode({"argv": key, "check": self.check}))
                raise
            except ValueError as error:
                self._kept[key] = error
        kept = self._kept[key]
        if isinstance(kept, ValueError):
            raise kept
        return kept  # type: ignore[no-any-return]


def known_to_hang(argv: Argv, hung: Dict[Argv, str]) -> str:
    """Why this command is not tried again, or "". A program that hung in two ways is taken to hang in all."""
    if argv in hung:
        return "%s hung in %s" % (process.shown(argv), hung[argv])
    others = [a for a in hung if a[0] == argv[0]]
    if len(others) > 1:
        return "%s hung in %s" % (" and ".join(process.shown(a) for a in others[:2]), hung[others[0]])
    return ""


def tell(channel: int, kind: str, text: str) -> None:
    data = (kind + text + "\n").encode("ascii")
    while data:
        data = data[os.write(channel, data) :]


def work(
    entries: List[Dict[str, Any]],
    *,
    orders: int,
    channel: int,
    noise: int,
    parent: int,
    nonce: str,
    hung: Dict[Argv, str],
) -> NoReturn:
    """The life of a worker after its fork. `orders` gives positions in `entries`, a line each, to the end."""
    try:
        me = os.getpid()
        _settle(parent, noise, all(not e.get("loads") for e in entries))
        commands = Commands(process.environment(nonce), hung, channel)
        with open(orders, "rb", 0) as lines:
            for line in lines:
                text = check(entries[int(line)], commands)
                if os.getpid() != me:  # The check forked, and this is its child come back.
                    os._exit(0)
                process.clear()
                tell(channel, "R", text)
        os._exit(0)
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
    finally:
        os._exit(70)


def _settle(parent: int, noise: int, light: bool) -> None:
    gc.enable()
    os.setsid()
    process.die_with_parent(parent)
    process.default_signals()
    process.become_subreaper()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    try:  # If memory runs out, let it be us whom the kernel picks, not the job that is running here.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if light and (hard == resource.RLIM_INFINITY or hard > LIGHT_MEMORY):
        resource.setrlimit(resource.RLIMIT_AS, (LIGHT_MEMORY, hard))
    # Behind everything else, so that they cannot replace the standard library; compute checks need torch.
    folders = os.environ.get("PYTHONPATH", "").split(":")
    try:
        import site

        folders.append(site.getusersitepackages())
    except (ImportError, AttributeError):
        pass
    sys.path += [f for f in folders if f.startswith("/") and f not in sys.path]


def check(entry: Dict[str, Any], commands: Commands) -> str:
    """Run one check to its end, whatever that is; its record."""
    name = str(entry["check"])
    started = time.monotonic()
    commands.begin(name, float(entry["timeout"]))
    host = Machine(commands, params=dict(entry.get("params") or {}))
    try:
        found = record.collected(_function(entry)(host), host.evidence)
        return record.answered(name, found, time.monotonic() - started, host.evidence)
    except MemoryError as error:
        # What it holds is held until the traceback is gone, and a record takes memory as well.
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        text = record.from_exception(name, error, time.monotonic() - started, host.evidence)
        error.__traceback__ = None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return text
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a check are the check's, not ours.
        return record.from_exception(name, error, time.monotonic() - started, host.evidence)


def _function(entry: Dict[str, Any]) -> Any:
    module, function = str(entry["module"]), str(entry["function"])
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (module + ".").startswith("%s." % error.name):
            raise
        raise LookupError("this agent has no function %s in %s" % (function, module)) from None
