"""``ltpctl doctor``: what of the environment is missing, and for which command."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from ltpctl import frame
from ltpctl.exits import Exit
from ltpctl.frame import Session


@dataclass(frozen=True)
class Item:
    """One thing that commands lean on."""

    name: str
    state: str
    """``ok``; ``missing`` (the commands named do not work); ``optional`` (absent, and they do without)."""
    needed_for: str
    detail: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    @frame.command(
        app,
        "doctor",
        example="ltpctl doctor\nltpctl doctor --json | jq '.items[] | select(.state == \"missing\")'",
    )
    def doctor(session: Session) -> Exit:
        """What is missing on this machine, for which command, and how to get it."""
        items = list(_examine(session))
        missing = any(item.state == "missing" for item in items)
        session.found = Exit.FINDINGS if missing else Exit.OK
        if session.out.json:
            session.out.document({"schema": "ltpctl/doctor/1", "items": [vars(item) for item in items]})
        else:
            session.out.table(
                ("", "item", "needed for", "found", "what to do"),
                ((_MARKS[i.state], i.name, i.needed_for, i.detail, i.remedy) for i in items),
                wrap=frozenset({"found", "what to do"}),
            )
        return session.found


_MARKS = {"ok": "ok", "missing": "MISSING", "optional": "-"}

_LIBRARIES = (
    (
        "torch",
        "compute and collective probes of this machine, ltf",
        "pip install 'ltpctl[train]' -c constraints.txt",
    ),
    ("psycopg", "a ledger on PostgreSQL", "pip install 'ltpctl[postgres]'"),
    ("uvloop", "up to a tenth less CPU in large fan-outs", "pip install 'ltpctl[fast]'"),
)
_PROGRAMS = (
    ("ssh-keygen", "removing a changed host key", "install openssh-client"),
    ("scontrol", "inventory from Slurm (slurm:)", "run on a Slurm host, or give slurm:FILE"),
    ("ipmitool", "the bmc checks of this machine", "install ipmitool"),
)


def _examine(session: Session) -> Iterator[Item]:
    yield _python()
    yield _guarded("configuration", "every command", lambda: _configuration(session))
    yield _guarded(
        "inventory",
        "every command",
        lambda: f"{_count(len(session.fleet), 'node')} from {session.fleet.source}",
    )
    yield _guarded("state folder", "ledger, locks, reports", lambda: _state_folder(session))
    yield _guarded("ledger", "history, states, baselines", lambda: _ledger(session))
    yield _ssh_keys(session)
    yield _known_hosts(session)
    yield _descriptors(session)
    for name, needed_for, remedy in _LIBRARIES:
        found = importlib.util.find_spec(name) is not None
        yield Item(
            name,
            "ok" if found else "optional",
            needed_for,
            "installed" if found else "absent",
            "" if found else remedy,
        )
    for name, needed_for, remedy in _PROGRAMS:
        path = shutil.which(name)
        yield Item(name, "ok" if path else "optional", needed_for, path or "absent", "" if path else remedy)


def _guarded(name: str, needed_for: str, look: Callable[[], str]) -> Item:
    from inventory.errors import UsageError

    try:
        return Item(name, "ok", needed_for, look())
    except (UsageError, OSError) as error:
        return Item(name, "missing", needed_for, str(error), "mend what is named here")


def _python() -> Item:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Item(
        "python",
        "ok" if good else "missing",
        "every command",
        version,
        "" if good else "Python 3.11 or later",
    )


def _configuration(session: Session) -> str:
    changed = [s for s in session.configuration.origins if s.source != "default"]
    if not changed:
        return "defaults"
    return f"{_count(len(changed), 'value')} {'differ' if len(changed) > 1 else 'differs'} from the defaults"


def _state_folder(session: Session) -> str:
    folder = session.configuration.state_dir
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} is not writable by this user")
    free = shutil.disk_usage(nearest).free
    if free < 256 << 20:
        raise OSError(f"{nearest} has {free >> 20} MiB free, 256 MiB are wanted")
    return f"{folder} ({free >> 30} GiB free)"


def _ledger(session: Session) -> str:
    with session.ledger(read_only=True) as ledger:
        return f"{ledger} ({_count(len(ledger.states(None)), 'node')} known)"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _ssh_keys(session: Session) -> Item:
    needed_for = "nodes over SSH"
    if os.environ.get("SSH_AUTH_SOCK"):
        return Item("ssh key", "ok", needed_for, "an SSH agent is running")
    wanted = [Path(p).expanduser() for p in session.configuration.settings.ssh.identity]
    keys = wanted or sorted(Path("~/.ssh").expanduser().glob("id_*"))
    found = [key for key in keys if key.exists() and key.suffix != ".pub"]
    if found:
        return Item("ssh key", "ok", needed_for, ", ".join(map(str, found)))
    return Item(
        "ssh key",
        "optional",
        needed_for,
        "no agent, no key",
        "start ssh-agent, or name a key in ssh.identity",
    )


def _known_hosts(session: Session) -> Item:
    named = session.configuration.settings.ssh.known_hosts or (
        "~/.ssh/known_hosts",
        "/etc/ssh/ssh_known_hosts",
    )
    files = [Path(p).expanduser() for p in named]
    found = [str(f) for f in files if f.exists()]
    remedy = "" if found else "ssh-keyscan over a path you trust, or --accept-new once"
    return Item(
        "known_hosts",
        "ok" if found else "optional",
        "nodes over SSH",
        ", ".join(found) or "no file yet",
        remedy,
    )


def _descriptors(session: Session) -> Item:
    from inventory.transport.descriptors import needed

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed(session.configuration.settings.ssh.concurrency)
    good = hard == resource.RLIM_INFINITY or hard >= wanted
    return Item(
        "open files",
        "ok" if good else "missing",
        f"{wanted} at this concurrency",
        f"{soft} (up to {hard})",
        "" if good else "raise ulimit -Hn, or lower ssh.concurrency",
    )
