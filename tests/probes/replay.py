"""A node made of captures: files and command outputs, seen through the same interface as a real one.

    host = ReplayHost(
        files={"/proc/meminfo": "MemTotal: 1 kB\n", "/sys/x/broken": Unsupported("...: Input/output error")},
        commands={("nvidia-smi", "-q"): text, ("dmesg",): Ran(1, "", "denied"), ("ibstat",): TimedOut("...")},
        links={"/sys/class/net/eth0": "../../devices/pci0000:00/0000:00:1f.6/net/eth0"},
        params={"expected": 8},
    )
    measures = list(check(host))

`files` are laid out in a temporary folder (`host.root`), so a check that opens paths below `root` itself
works too. A folder of captures may be given instead of, or under, `files` as ``folder``: it is copied.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.agent.api import Ran, Unsupported
from probes.agent.host import Machine, accepted

Answer = str | Ran | Exception


class ReplayHost(Machine):
    """`Machine` over captures. A program is installed when it was captured, or it is in `programs`.

    A program that is not installed raises Unsupported, as on a node. A captured program asked for something
    that was not captured is a hole in the test: AssertionError, which no check expects.
    `asked` lists every argv that was run, in order.
    """

    def __init__(
        self,
        files: Mapping[str, str | bytes | Exception] | None = None,
        commands: Mapping[tuple[str, ...], Answer] | None = None,
        params: dict[str, Any] | None = None,
        links: Mapping[str, str] | None = None,
        programs: Iterable[str] = (),
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="replay-")
        super().__init__(root=self._folder.name, params=dict(params or {}))
        if folder is not None:
            shutil.copytree(folder, self.root, symlinks=True, dirs_exist_ok=True)
        self._failing: dict[str, Exception] = {}
        for path, content in (files or {}).items():
            place = self._place(path)
            if isinstance(content, Exception):
                self._failing[path] = content
                place.touch()
            else:
                place.write_bytes(content.encode() if isinstance(content, str) else content)
        self._links = dict(links or {})
        for path, target in self._links.items():
            # An absolute target must stay inside the captures.
            inside = os.path.relpath(target, os.path.dirname(path)) if target.startswith("/") else target
            self._place(path).symlink_to(inside)
        self._commands = {
            (os.path.basename(argv[0]), *argv[1:]): answer for argv, answer in (commands or {}).items()
        }
        self._programs = {os.path.basename(p) for p in programs} | {argv[0] for argv in self._commands}
        self.asked: list[tuple[str, ...]] = []

    def _place(self, path: str) -> Path:
        place = Path(self.root + "/" + path.lstrip("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def run(self, argv: Sequence[str], timeout: float = 10.0, ok: Sequence[int] = (0,)) -> Ran:
        name = os.path.basename(argv[0])
        key = (name, *argv[1:])
        if name not in self._programs:
            raise Unsupported("no such program: " + argv[0])
        self.asked.append(key)
        if key not in self._commands:
            raise AssertionError(f"no capture of {key}; captured: {sorted(self._commands)}")
        answer = self._commands[key]
        if isinstance(answer, Exception):
            raise answer
        return accepted(argv, Ran(0, answer, "") if isinstance(answer, str) else answer, ok)

    def which(self, program: str) -> str | None:
        name = os.path.basename(program)
        return "/usr/bin/" + name if name in self._programs else None

    def read(self, path: str, limit: int = 1 << 20) -> str:
        if path in self._failing:
            raise self._failing[path]
        return super().read(path, limit)

    def link(self, path: str) -> str:
        return self._links.get(path) or super().link(path)
