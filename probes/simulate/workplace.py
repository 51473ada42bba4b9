"""The folder of a simulated fleet: configuration, inventory and keys that point the other commands at it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from inventory.errors import UsageError
from inventory.nodeset import fold
from probes.simulate.scenario import Scenario
from probes.simulate.server import Served

HEADER = "# Written by 'ltpctl sim start'; the next one with the same --dir replaces it.\n"

_LOCK = ".lock"


@dataclass(frozen=True)
class Workplace:
    """A folder that is this fleet's alone while it runs."""

    folder: Path

    def write(self, scenario: Scenario, served: Served) -> Path:
        """Write everything; the path of the configuration. The key opens nothing but these servers."""
        key = self.folder / "id_ed25519"
        self._put(key.name, served.client_key, 0o600)
        self._put("known_hosts", f"[127.101.*]:{served.port} {served.host_key}\n".encode())
        nodes: dict[str, dict[str, str]] = {}
        usual = next(iter(scenario.sku_of.values()))
        for name, address in served.addresses.items():
            other = {} if scenario.sku_of[name] == usual else {"sku": scenario.sku_of[name]}
            nodes[name] = {"address": address, **other}
        inventory: dict[str, object] = {
            "cluster": "simulated",
            "defaults": {"user": "sim", "port": served.port, "sku": usual, "identity": str(key)},
        }
        if groups := _groups(scenario):
            inventory["groups"] = groups
        self._put("cluster.yaml", _yaml(inventory | {"nodes": nodes}))
        own: dict[str, list[str]] = {
            "checks": [str(path.absolute()) for path in scenario.checks],
            "profiles": [str(path.absolute()) for path in scenario.profiles],
        }
        config: dict[str, object] = {
            "inventory": str(self.folder / "cluster.yaml"),
            "state_dir": str(self.folder / "state"),
            "ssh": {"config": [], "known_hosts": [str(self.folder / "known_hosts")]},
        }
        if any(own.values()):
            config["validate"] = {name: paths for name, paths in own.items() if paths}
        self._put("config.yaml", _yaml(config))
        return self.folder / "config.yaml"

    def _put(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Whole or not at all, never through somebody's symbolic link, and never readable too early."""
        beside = self.folder / f".{name}.new"
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        beside.replace(self.folder / name)


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Workplace]:
    """Hold `folder`. Raises UsageError if it holds foreign files, or another running fleet has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; name another folder with --dir") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another simulated fleet uses this folder; end it, or name another with --dir"
            ) from None
        yield Workplace(folder)
    finally:
        os.close(lock)


def _refuse_foreign(folder: Path) -> None:
    """Only a folder that is empty or was written by a fleet before may be written to."""
    if not any(entry.name != _LOCK for entry in folder.iterdir()):
        return
    config = folder / "config.yaml"
    ours = config.is_file() and config.read_bytes().startswith(HEADER.encode())
    if not ours:
        raise UsageError(f"{folder}: holds other files; name an empty or a new folder with --dir")


def _groups(scenario: Scenario) -> dict[str, str]:
    """A group for each SKU where there are several."""
    by_sku: dict[str, list[str]] = {}
    for name, sku in scenario.sku_of.items():
        by_sku.setdefault(sku, []).append(name)
    return {sku: fold(names) for sku, names in by_sku.items()} if len(by_sku) > 1 else {}


def _yaml(value: object) -> bytes:
    return (HEADER + yaml.safe_dump(value, sort_keys=False)).encode()
