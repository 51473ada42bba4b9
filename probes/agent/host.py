"""The machine itself, as checks see it: files through `Machine`, commands through `process`."""

import errno
import fnmatch
import os
from typing import Any, Callable, Dict, List, Optional, Sequence

from probes.agent.api import Host, Ran, Unsupported

VENDOR_FOLDERS = (
    "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin",
    "/opt/rocm/bin", "/opt/amdgpu/bin", "/usr/local/cuda/bin", "/usr/local/nvidia/bin",
    "/usr/bin/habanalabs", "/opt/habanalabs/bin", "/usr/local/Ascend/driver/tools", "/usr/local/dcmi",
    "/opt/mellanox/bin", "/usr/mft/bin", "/opt/slurm/bin", "/snap/bin",
)  # fmt: skip
"""Where vendors put their tools; a login over SSH often has a shorter PATH than a person's shell."""

EVIDENCE_LINES, EVIDENCE_LENGTH = 50, 500

Runner = Callable[[Sequence[str], float], Ran]


class Machine(Host):
    """A machine whose files are read below `root` and whose commands `runner` runs.

    `runner(argv, timeout)` takes a program's full path first; it raises TimedOut, and ValueError for a flood.
    """

    def __init__(
        self, runner: Optional[Runner] = None, root: str = "", params: Optional[Dict[str, Any]] = None
    ):
        self.root = root
        self.params = {} if params is None else params
        self.evidence = []
        self._runner = runner
        self._paths: Dict[str, Optional[str]] = {}

    def run(self, argv: Sequence[str], timeout: float = 10.0, ok: Sequence[int] = (0,)) -> Ran:
        program = self.which(argv[0])
        if program is None or self._runner is None:
            raise Unsupported("no such program: " + argv[0])
        return accepted(argv, self._runner((program, *argv[1:]), timeout), ok)

    def which(self, program: str) -> Optional[str]:
        if program not in self._paths:
            self._paths[program] = find_program(program)
        return self._paths[program]

    def read(self, path: str, limit: int = 1 << 20) -> str:
        try:
            return read_bytes(self.root + path, limit).decode("utf-8", "replace")
        except OSError as error:
            raise Unsupported("%s: %s" % (path, error.strerror or error)) from None

    def read_or(self, path: str, default: str = "") -> str:
        try:
            return self.read(path).strip()
        except Unsupported:
            return default

    def glob(self, pattern: str) -> List[str]:
        return sorted(matches(self.root, pattern))

    def link(self, path: str) -> str:
        try:
            return os.readlink(self.root + path)
        except OSError:
            return ""

    def note(self, line: str) -> None:
        if len(self.evidence) < EVIDENCE_LINES:
            line = line.rstrip()
            self.evidence.append(
                line if len(line) <= EVIDENCE_LENGTH else line[: EVIDENCE_LENGTH - 3] + "..."
            )


def accepted(argv: Sequence[str], ran: Ran, ok: Sequence[int]) -> Ran:
    """`ran` if its status is one of `ok` (empty: any), else ValueError with the tool's own last words."""
    if not ok or ran.code in ok:
        return ran
    ending = "status %d" % ran.code if ran.code >= 0 else "signal %d" % -ran.code
    words = [line.strip() for line in (ran.err + "\n" + ran.out).splitlines() if line.strip()]
    said = (
        ": " + words[-1 if ran.err.strip() == "" else len(ran.err.strip().splitlines()) - 1][:300]
        if words
        else ""
    )
    raise ValueError("%s ended with %s%s" % (" ".join(argv)[:200], ending, said))


def find_program(program: str) -> Optional[str]:
    """Full path of an executable: as given when it is a path, else from PATH and the vendors' folders."""
    if "/" in program:
        return program if os.access(program, os.X_OK) and os.path.isfile(program) else None
    # Relative entries would run whatever lies in the folder where the login happened to start.
    folders = [f for f in os.environ.get("PATH", "").split(":") if f.startswith("/")]
    for folder in folders + [f for f in VENDOR_FOLDERS if f not in folders]:
        path = folder.rstrip("/") + "/" + program
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def read_bytes(path: str, limit: int) -> bytes:
    """At most `limit` bytes. Never waits: a pipe without a writer is empty, /dev/kmsg ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    parts, size = [], 0
    try:
        while size < limit:
            try:
                part = os.read(descriptor, 65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EPIPE:  # /dev/kmsg: records were overwritten while we read; go on.
                    continue
                raise
            if not part:
                break
            parts.append(part)
            size += len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)[:limit]


def matches(root: str, pattern: str) -> List[str]:
    """Paths (without `root`) that a pattern with ``*``, ``?``, ``[...]`` in its parts matches; no ``**``."""
    found = [""]
    for part in pattern.strip("/").split("/"):
        if any(c in part for c in "*?["):
            step = []
            for path in found:
                try:
                    names = os.listdir(root + (path or "/"))
                except OSError:
                    continue
                hidden = part.startswith(".")
                step += [
                    path + "/" + n
                    for n in names
                    if fnmatch.fnmatchcase(n, part) and (hidden or not n.startswith("."))
                ]
            found = step
        else:
            found = [path + "/" + part for path in found if os.path.lexists(root + path + "/" + part)]
    return found
