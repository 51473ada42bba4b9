"""Training runs as their users start them, and what they told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ltf.events import path_of, read
from tests.ltf import ranks

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Runs:
    """`settings`: of every run here, each in a folder of its own under `folder`."""

    settings: dict[str, Any]
    folder: Path

    def config(self, name: str, overrides: Mapping[str, Any]) -> Path:
        """A configuration file; overrides by dotted name."""
        made = deepcopy(self.settings)
        made["run"]["output"] = str(self.folder / name)
        for key, value in overrides.items():
            section = made
            *path, last = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        file = self.folder / f"{name}-{len(list(self.folder.glob('*.yaml')))}.yaml"
        file.write_text(yaml.safe_dump(made))
        return file

    def warm(
        self,
        name: str,
        world: int = 1,
        environment: Mapping[str, str] | None = None,
        status: int = 0,
        **overrides: Any,
    ) -> Told:
        """In ranks that have imported torch already; overrides as `parallel__expert=2`.

        AssertionError if a rank ends with another status.
        """
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        file = self.config(name, dotted)
        statuses = ranks.run(train, world, str(file), timeout=110, environment=environment)
        assert statuses == [status] * world, f"exit statuses {statuses}"
        return Told(self.folder / name, statuses)

    def start(
        self, name: str, world: int = 1, environment: Mapping[str, str] | None = None, **overrides: Any
    ) -> Processes:
        """In processes of their own, which can be killed."""
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return Processes.start(
            self.config(name, dotted), self.folder / name, world, environment or {}, self.folder
        )


@dataclass(frozen=True)
class Told:
    """A run that is over: its folder, and each rank's exit status."""

    folder: Path
    statuses: Sequence[int]

    def events(self, kind: str | None = None, rank: int = 0) -> list[dict[str, Any]]:
        found = read(path_of(self.folder, rank))
        return [event for event in found if kind is None or event["event"] == kind]

    @property
    def losses(self) -> dict[int, float]:
        """By step; of a step that was made again, the last."""
        return {event["step"]: event["loss"] for event in self.events("step")}

    @property
    def findings(self) -> list[str]:
        return [event["kind"] for event in self.events("finding")]


@dataclass
class Processes:
    folder: Path
    children: list[subprocess.Popen[str]]
    outputs: list[Path] = field(default_factory=list)

    @classmethod
    def start(
        cls, config: Path, folder: Path, world: int, environment: Mapping[str, str], logs: Path
    ) -> Processes:
        port = ranks.free_port()
        children, outputs = [], []
        for rank in range(world):
            launch = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            output = logs / f"{config.stem}-rank{rank}.log"
            with output.open("w") as file:
                child = subprocess.Popen(
                    [sys.executable, "-m", "ltf", "train", str(config)],
                    env={
                        **os.environ,
                        **(launch if world > 1 else {}),
                        "OMP_NUM_THREADS": "1",
                        "GLOO_SOCKET_IFNAME": "lo",
                        "PYTHONPATH": str(ROOT),
                        **environment,
                    },
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            children.append(child)
            outputs.append(output)
        return cls(folder, children, outputs)

    def when(self, happened: Callable[[list[dict[str, Any]]], bool], timeout: float = 100) -> None:
        """Wait until rank 0's events say so."""
        told = Told(self.folder, [])
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if path_of(self.folder, 0).exists() and happened(told.events()):
                return
            if any(child.poll() is not None for child in self.children):
                break
            time.sleep(0.005)
        raise AssertionError(f"it did not happen; the output was:\n{self.output()}")

    def signal(self, number: int, only: int | None = None) -> None:
        for rank, child in enumerate(self.children):
            if only in (None, rank):
                child.send_signal(number)

    def wait(self, timeout: float = 100) -> Told:
        try:
            statuses = [child.wait(timeout) for child in self.children]
        finally:
            for child in self.children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        return Told(self.folder, statuses)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)


def train(config: str) -> int:
    """In a warm rank: what `python -m ltf train` does."""
    from ltf.__main__ import main

    return main(["train", config])


def reached(step: int) -> Callable[[list[dict[str, Any]]], bool]:
    """The attempt that is under way has done that step."""
    return lambda events: any(e["event"] == "step" and e["step"] >= step for e in latest(events))


def latest(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the last attempt."""
    starts = [i for i, event in enumerate(events) if event["event"] == "run_started"]
    return events[starts[-1] :] if starts else []
