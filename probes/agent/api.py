"""What a check may use on the node: run a command, read a file, say what was measured.

Every check is a function ``f(host) -> iterable of Measure`` in ``probes.checks.FAMILY``; it raises
Unsupported when the node has nothing to ask, and ValueError when an answer cannot be understood.
Parsers are pure functions of text beside it. Standard library only, Python 3.8 and up.
"""

from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Union

Scalar = Union[int, float, str, bool, None]


class Measure(NamedTuple):
    """One value: the metric's last name, the device it belongs to (None: the node), the value."""

    metric: str
    value: Scalar
    device: Optional[str] = None


class Ran(NamedTuple):
    """How a command ended. `code` is negative for a signal."""

    code: int
    out: str
    err: str


class Unsupported(Exception):
    """The node has no such tool, file or device: nothing could be measured. Its text says what is lacking."""


class TimedOut(Exception):
    """A command of the check passed its limit, or is known to hang on this node."""


class Host:
    """The node, as checks see it. Tests give another one that replays captures under `root`.

    A check that yields no measure at all has failed: "none of them" is a measure, and a device whose value
    cannot be read has the value None.
    """

    root: str
    """Prefix of all paths: "" on a node, a folder of captures in tests."""
    params: Dict[str, Any]
    """Parameters of the running check, from the catalogue, the SKU profile and the inventory."""
    evidence: List[str]
    """Lines worth showing to a person; `note` adds to it."""

    def run(self, argv: Sequence[str], timeout: float = 10.0, ok: Sequence[int] = (0,)) -> Ran:
        """Run a command without a shell, its own process group killed at the limit. The same argv is run once
        per lane and its answer kept. Raises Unsupported if there is no such program, TimedOut, and
        ValueError if the status is not in `ok`. `ok=()` accepts any."""
        raise NotImplementedError

    def which(self, program: str) -> Optional[str]:
        """Path of a program (PATH, then the usual vendor folders), or None."""
        raise NotImplementedError

    def read(self, path: str, limit: int = 1 << 20) -> str:
        """Text of a file (broken UTF-8 replaced). Raises Unsupported when it is absent or unreadable."""
        raise NotImplementedError

    def read_or(self, path: str, default: str = "") -> str:
        """Like `read`, stripped, with a default instead of Unsupported."""
        raise NotImplementedError

    def glob(self, pattern: str) -> List[str]:
        """Sorted paths without `root`."""
        raise NotImplementedError

    def link(self, path: str) -> str:
        """Where a symbolic link points, or ""."""
        raise NotImplementedError

    def note(self, line: str) -> None:
        """Keep a line as evidence (capped in number and length)."""
        raise NotImplementedError


Measures = Iterable[Measure]
