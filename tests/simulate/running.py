"""The simulated fleet as its users run it: a process of ``ltpctl sim start`` and others that use it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LTPCTL = str(Path(sys.executable).with_name("ltpctl"))


@dataclass
class Running:
    """A fleet that is ready."""

    process: subprocess.Popen[str]
    told: dict[str, Any]
    """The document that it printed when it was."""
    errors: Path

    @property
    def config(self) -> str:
        return str(self.told["config"])

    def end(self, number: int = signal.SIGTERM) -> Ended:
        """End it by a signal."""
        began = time.monotonic()
        self.process.send_signal(number)
        return ended(self.process, began)


@dataclass
class Ended:
    """How a process ended, with its own use of the machine as the kernel counted it."""

    status: int
    """Exit status; negative: the signal."""
    seconds: float
    cpu_seconds: float
    peak_mb: float


def ended(process: subprocess.Popen[str], began: float) -> Ended:
    """Wait for the end. The peak is read while it runs: the kernel's final count (ru_maxrss) of a program
    includes that of whoever started it, here a test process with everything that it has imported."""
    peak, pid = 0, 0
    while not pid:
        peak = max(peak, _peak_kib(process.pid))
        time.sleep(0.02)
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, time.monotonic() - began, used.ru_utime + used.ru_stime, peak / 1024)


def _peak_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Running]:
    """``ltpctl sim start --json`` with `arguments`, until the block is left."""
    command = [LTPCTL, "sim", "start", "--json", "--dir", str(folder), *arguments]
    errors = folder.with_name(f"{folder.name}.stderr")
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        text = line = ""
        # The document is indented: only its last line begins with the brace.
        while not line.startswith("}"):
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()}: {errors.read_text()}"
            text += line
        yield Running(process, json.loads(text), errors)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def planted(faults: Mapping[str, str]) -> list[str]:
    return [word for node, kind in faults.items() for word in ("--fault", f"{node}={kind}")]


def ltpctl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LTPCTL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, **environment},
    )
