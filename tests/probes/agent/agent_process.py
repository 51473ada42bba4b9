"""The agent as sshd would run it: a real process, its stdin kept open, its stdout read as it comes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from probes.agent.bundle import Bundle, CheckRequest, WatchRequest, bundle, fresh_nonce
from probes.agent.frames import Decoder
from probes.model import CheckRecord

MISBEHAVING = "probes.checks.misbehaving"
SOURCES = {MISBEHAVING: (Path(__file__).parent / "misbehaving.py").read_text()}


def ask(function: str, name: str = "", lane: str = "", **fields: object) -> CheckRequest:
    """A request for one of the functions in `misbehaving`; its check is called ``lane.function``."""
    lane = lane or "odd"
    values: dict[str, object] = {"timeout": 10.0, **fields}
    return CheckRequest(
        check=name or f"{lane}.{function}", module=MISBEHAVING, function=function, lane=lane, **values
    )  # type: ignore[arg-type]


class AgentProcess:
    def __init__(
        self,
        checks: Sequence[CheckRequest],
        *,
        watch: WatchRequest | None = None,
        budget: float = 30.0,
        python: str = sys.executable,
        payload: Callable[[bytes], bytes] = lambda payload: payload,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        self.bundle: Bundle = bundle(checks, watch, budget, sources=SOURCES)
        self.nonce = fresh_nonce()
        self.decoder = Decoder(self.nonce, self.bundle.checks)
        self.stdout = b""
        self.process = subprocess.Popen(
            self.bundle.argv(self.nonce, python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
        )
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(payload(self.bundle.payload))
            self.process.stdin.flush()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.kill()
        self.process.wait()

    def read_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Read stdout until the condition holds; fails when it ends, or the time passes, before."""
        end = time.monotonic() + seconds
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"not within {seconds} s; so far: {self.stdout[-2000:]!r}"
            assert self._read(left), f"the output ended: {self.stdout[-2000:]!r}; {self.errors()}"

    def _read(self, seconds: float) -> bool:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            return True
        chunk = os.read(self.process.stdout.fileno(), 65536)
        self.stdout += chunk
        self.decoder.feed(chunk, time.time())
        return bool(chunk)

    def finish(self, seconds: float = 20.0) -> dict[str, CheckRecord]:
        """All records, once the agent has exited by itself with status 0; stdin stays open until then."""
        end = time.monotonic() + seconds
        while self._read(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"still running after {seconds} s: {self.stdout[-2000:]!r}"
        status = self.process.wait(5)
        assert status == 0, (status, self.errors())
        assert self.decoder.done
        assert self.decoder.faults == []
        return self.decoder.complete("never came")

    def errors(self) -> str:
        assert self.process.stderr
        os.set_blocking(self.process.stderr.fileno(), False)
        return (self.process.stderr.read() or b"").decode()

    def left(self) -> list[int]:
        """Every process here that is the agent's: by its nonce on the command line or in the environment."""
        mark = self.nonce.encode()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    folder = Path("/proc") / entry
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    marked = (
                        mark in (folder / "cmdline").read_bytes() or mark in (folder / "environ").read_bytes()
                    )
                    if marked and state != "Z":
                        found.append(int(entry))
        return found

    def gone_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.left():
                return True
            time.sleep(0.02)
        return False


def run(*checks: CheckRequest, **options: object) -> dict[str, CheckRecord]:
    """Records of one whole run; nothing of it may be left."""
    with AgentProcess(checks, **options) as agent:  # type: ignore[arg-type]
        records = agent.finish()
        assert agent.left() == []
        return records
