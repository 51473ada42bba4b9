"""The last words of a rank: the exception that ended it, where it was raised, and whether it only followed.

Reads text that a program wrote; nothing of it is executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from recovery.blame import Blame
from recovery.diagnose.stacks import is_library, traceback_frames

CONSEQUENCES = (
    "lost the other ranks",
    "/gloo/",
    "PeersGone",
    "DistNetworkError",
    "DistStoreError",
    "Connection closed by peer",
    "remote process exited or there was a network error",
    "Watchdog caught collective operation timeout",
    "communicator was aborted",
    "ncclRemoteError",
    "taking the entire process down",
    "recvValue failed",
)
"""What torch, its back ends and the trainer say when another rank ended or did not come."""


@dataclass(frozen=True, slots=True)
class Cause:
    """`retryable`: False where another start can only end the same way."""

    kind: str
    blame: Blame
    retryable: bool = True


BY_MESSAGE = {
    "No space left on device": Cause("storage.full", Blame.PLATFORM),
    "Disk quota exceeded": Cause("storage.full", Blame.PLATFORM),
    "Address already in use": Cause("port.taken", Blame.PLATFORM),
    "EADDRINUSE": Cause("port.taken", Blame.PLATFORM),
    "Input/output error": Cause("storage.error", Blame.PLATFORM),
    "Stale file handle": Cause("storage.error", Blame.PLATFORM),
    "Transport endpoint is not connected": Cause("storage.error", Blame.PLATFORM),
    "Tried to allocate": Cause("memory.device_oom", Blame.USER),
    "CUDA error": Cause("device.error", Blame.UNKNOWN),
    "HIP error": Cause("device.error", Blame.UNKNOWN),
}
"""Texts of errno(3) and torch. A bare device error is as often a bad device as bad code."""

BY_EXCEPTION = {
    "ImportError": Cause("code.import", Blame.USER, retryable=False),
    "ModuleNotFoundError": Cause("code.import", Blame.USER, retryable=False),
    "SyntaxError": Cause("code.syntax", Blame.USER, retryable=False),
    "IndentationError": Cause("code.syntax", Blame.USER, retryable=False),
    "TabError": Cause("code.syntax", Blame.USER, retryable=False),
    "FileNotFoundError": Cause("data.missing_file", Blame.USER, retryable=False),
    "NotADirectoryError": Cause("data.missing_file", Blame.USER, retryable=False),
    "IsADirectoryError": Cause("data.missing_file", Blame.USER, retryable=False),
    "PermissionError": Cause("data.permission", Blame.USER, retryable=False),
    "MemoryError": Cause("memory.host_oom", Blame.USER),
    "OutOfMemoryError": Cause("memory.device_oom", Blame.USER),
    "KeyboardInterrupt": Cause("rank.interrupted", Blame.PLATFORM),
}


@dataclass(frozen=True, slots=True)
class Words:
    """`place`: ``file:line ExceptionType`` of the innermost frame of the user's own code, or, without one, of
    the innermost at all; None where the text does not tell. `own`: it is the user's own code.
    `consequence`: it tells of other ranks' end, so that the cause lies elsewhere."""

    exception: str
    message: str
    place: str | None = None
    own: bool = False
    consequence: bool = False

    @property
    def cause(self) -> Cause:
        """What the exception says; of one that no table knows, that it is the user's where their code is."""
        for text, cause in BY_MESSAGE.items():
            if text in self.message:
                return cause
        known = BY_EXCEPTION.get(self.exception.rpartition(".")[2])
        return known or Cause("code.exception", Blame.USER if self.own else Blame.UNKNOWN)


def last_words(text: str) -> Words | None:
    """Of a rank's last output. In a chain of exceptions the latest counts that is no consequence; None where
    the output ends with neither an exception nor a known consequence."""
    lines = [PREFIX.sub("", line) for line in text.splitlines()]
    chain = [words for block in _last_chain(lines) if (words := _of_block(block)) is not None]
    own = [words for words in chain if not words.consequence]
    if chain:
        return own[-1] if own else chain[-1]
    said = [line.strip() for line in lines if line.strip()][-TAIL:]
    for line in reversed(said):
        if _follows(line):
            return Words("", line, consequence=True)
    return None


PREFIX = re.compile(r"^\[(?:rank|default)\d+\]: ?")
"""Before each line, by torch's own hook and by torchrun's tee."""
START = "Traceback (most recent call last)"
JOINTS = ("During handling of the above exception", "The above exception was the direct cause")
TAIL = 20
"""Lines at the end in which a consequence without a traceback is looked for."""
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?:: (.*))?$")
_FILE = re.compile(r'^\s+File "(.+)", line (\d+)')
_SYNTAX = re.compile(r"^(?:SyntaxError|IndentationError|TabError)\b")


def _last_chain(lines: list[str]) -> list[list[str]]:
    """The blocks of the last traceback and of those that it was raised from, oldest first."""
    starts = [at for at, line in enumerate(lines) if START in line]
    if not starts:
        # Python shows a script's own syntax error without the word.
        ends = [at for at, line in enumerate(lines) if _SYNTAX.match(line)]
        return [lines[max(0, ends[-1] - 5) : ends[-1] + 1]] if ends else []
    blocks = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    first = len(blocks) - 1
    while first and any(line.startswith(JOINTS) for line in blocks[first - 1]):
        first -= 1
    return blocks[first:]


def _of_block(block: list[str]) -> Words | None:
    files = [at for at, line in enumerate(block) if _FILE.match(line)]
    for at in range(files[-1] + 1 if files else 1, len(block)):
        seen = _ERROR.match(block[at])
        if seen is not None:
            message = " ".join([seen[2] or "", *(line.strip() for line in block[at + 1 : at + 4])]).strip()
            name = block[at].split(":", 1)[0]
            place, own = _place("\n".join(block[:at]), block[:at], name)
            said = f"{name}: {message}"
            return Words(name, message, place, own, _follows(said))
    return None


def _place(text: str, block: list[str], name: str) -> tuple[str | None, bool]:
    short = name.rpartition(".")[2]
    if _SYNTAX.match(short):
        files = [seen for line in block if (seen := _FILE.match(line))]
        return (f"{files[-1][1]}:{files[-1][2]} {short}", True) if files else (None, True)
    frames = traceback_frames(text)
    own = next((frame for frame in frames if not is_library(frame.file)), None)
    frame = own or (frames[0] if frames else None)
    return (None if frame is None else f"{frame.file}:{frame.line} {short}"), own is not None


def _follows(text: str) -> bool:
    return any(each in text for each in CONSEQUENCES)
