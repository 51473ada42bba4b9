"""What an exit status or a signal says: its meaning, who usually has to act, and what to look at next.

The table is data (``exitstatus.yaml``, each row with its source). A status alone proves nothing about a node.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


class Blame(StrEnum):
    """Who usually has to act."""

    HARDWARE = "hardware"
    USER = "user"
    PLATFORM = "platform"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: by a status of its own or by a signal."""

    status: int | None
    """0 to 255; None when a signal ended it."""
    signal: int | None
    state: str | None = None
    """A Slurm job state that says more than the numbers do."""
    slurm: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """One row of the table, or an honest gap: ``known`` is False for a program's own number."""

    name: str
    meaning: str
    blame: Blame
    retry: bool | None
    """Whether the same start may well succeed; None where it depends on what else is found."""
    next: str
    source: str
    known: bool = True


def explain(ending: Ending) -> Explanation:
    """The most specific row that fits: a Slurm state, then a signal, then a status."""
    table = _table()
    if ending.state is not None and ending.state in table["slurm_states"]:
        return table["slurm_states"][ending.state]
    if ending.signal:
        rows = table["slurm_signals"] if ending.slurm and ending.signal in table["slurm_signals"] else None
        found = (rows or table["signals"]).get(ending.signal)
        return found or _own(f"signal {ending.signal}", "a signal that no table explains")
    if ending.status is None:
        return _own("none", "no exit status is known")
    own = f"a number of the program's own ({ending.status})"
    return table["statuses"].get(ending.status) or _own(f"status {ending.status}", own)


def of_popen(returncode: int) -> Ending:
    """``subprocess.Popen.returncode`` and torchrun's ``exitcode``: -N is signal N."""
    return Ending(None, -returncode) if returncode < 0 else of_shell(returncode)


def of_shell(status: int) -> Ending:
    """``$?`` and a container's exit code: 128+N is signal N, and so is 256-N.

    256-N arises when a launcher exits with the negative number that Popen gave it (-9 becomes 247). 255
    stays a status: ssh uses it for its own failures.
    """
    if 128 < status <= 128 + _LAST_SIGNAL and status - 128 in _table()["signals"]:
        return Ending(None, status - 128)
    if 256 - _LAST_SIGNAL <= status < 255 and 256 - status in _table()["signals"]:
        return Ending(None, 256 - status)
    return Ending(status, None)


def of_wait(wstatus: int) -> Ending:
    """The 16 bits that ``os.wait`` returns."""
    return Ending(None, wstatus & 0x7F) if wstatus & 0x7F else Ending((wstatus >> 8) & 0xFF, None)


def of_slurm(code: str, state: str = "") -> Ending | None:
    """Slurm's ``ExitCode``, status:signal (``0:9``), with the job's state if known; None if it is neither.

    The state may carry more words (``CANCELLED by 1000``) or a ``+``.
    """
    word = re.match(r"[A-Z_]+", state)
    telling = word[0] if word and word[0] in _table()["slurm_states"] else None
    seen = re.fullmatch(r"\s*(\d{1,5}):(\d{1,3})\s*", code)
    if seen is None:
        return Ending(None, None, telling, slurm=True) if telling else None
    status, signal = int(seen[1]), int(seen[2])
    if signal:
        return Ending(None, signal, telling, slurm=True)
    through = of_shell(status)
    return Ending(through.status, through.signal, telling, slurm=True)


# Signals above are real-time signals, which nothing in this trade sends.
_LAST_SIGNAL = 31


# --- torchrun's report ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TorchrunFailure:
    """One rank in torchrun's closing report, or in its ``failed (exitcode: ...)`` line."""

    exitcode: int
    rank: int | None
    local_rank: int | None
    pid: int | None
    host: str | None
    time: str | None
    """As torchrun printed it, local time of that node."""
    root_cause: bool
    """torchrun calls it the first failure that it observed, by its own clock."""

    @property
    def ending(self) -> Ending:
        return of_popen(self.exitcode)


_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_FIELD = re.compile(r"^\s*(?:\[\d+\]:)?\s*(time|host|rank|exitcode)\s*:\s*(.*?)\s*$")


def of_torchrun(text: str) -> tuple[TorchrunFailure, ...]:
    """The failures in torchrun's output, root cause first; the summary lines only where no report follows.

    Format: torch/distributed/elastic/multiprocessing/errors/__init__.py (ChildFailedError).
    """
    reported = _report(text)
    if reported:
        return tuple(sorted(reported, key=lambda f: not f.root_cause))
    return tuple(
        TorchrunFailure(int(m[1]), None, int(m[2]), int(m[3]), None, None, False)
        for m in _FAILED.finditer(text)
    )


def _report(text: str) -> list[TorchrunFailure]:
    found: list[TorchrunFailure] = []
    root = False
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if "Root Cause (first observed failure):" in line:
            root = True
        elif line.strip() == "Failures:":
            root = False
        elif seen := _FIELD.match(line):
            if seen[1] == "time":
                fields = {}
            fields[seen[1]] = seen[2]
            if seen[1] == "exitcode":
                failure = _failure(fields, root)
                found += [failure] if failure else []
                fields = {}
    return found


def _failure(fields: Mapping[str, str], root: bool) -> TorchrunFailure | None:
    code = re.match(r"(-?\d+)(?:\s*\(pid:\s*(\d+)\))?", fields["exitcode"])
    rank = re.match(r"(\d+)(?:\s*\(local_rank:\s*(\d+)\))?", fields.get("rank", ""))
    if code is None or "time" not in fields:
        return None
    return TorchrunFailure(
        exitcode=int(code[1]),
        rank=int(rank[1]) if rank else None,
        local_rank=int(rank[2]) if rank and rank[2] else None,
        pid=int(code[2]) if code[2] else None,
        host=fields.get("host"),
        time=fields["time"],
        root_cause=root,
    )


# --- the table -----------------------------------------------------------------------------------------


@cache
def _table() -> dict[str, dict[Any, Explanation]]:
    text = files("recovery.diagnose").joinpath("exitstatus.yaml").read_text(encoding="utf-8")
    read = yaml.safe_load(text)
    return {
        part: {key: Explanation(**{**row, "blame": Blame(row["blame"])}) for key, row in rows.items()}
        for part, rows in read.items()
    }


def _own(name: str, meaning: str) -> Explanation:
    return Explanation(
        name, meaning, Blame.UNKNOWN, None, "the last lines of its output", "none", known=False
    )
