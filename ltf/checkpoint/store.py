"""The folder of a run's checkpoints, on a filesystem that all ranks share.

    latest                       name of the newest one, for people and scripts; loading does not rely on it
    step-00001200/               a committed checkpoint: manifest.json, COMMITTED, .metadata, *.distcp
    writing/step-00001300-a1b2/  one being written, or left behind by a process that died
    deleting/...                 one being deleted
    quarantine/step-00001100-... one that failed verification: kept, never read

A checkpoint is written under ``writing/``, made durable, marked there, and then renamed, so that a folder of
the name ``step-...`` is whole from its first moment. To delete one is to rename it first, so an interrupted
deletion leaves nothing that reads as good. Only the process of rank 0 renames, hence only it can commit.

**Left-overs under writing/** are removed when surely nobody can make them good any more: the process that
could commit them (`OWNER.json`: host, boot, process and its start) ran on this host and is gone or belongs to
an earlier boot, or nothing in them has changed for a day by the filesystem's own clock. Another rank that
should still write into such a folder only fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ltf.checkpoint import manifest as manifests
from ltf.checkpoint.manifest import MANIFEST, MARKER, Manifest, Unfit
from ltf.checkpoint.retention import expendable

PREFIX = "step-"
LATEST = "latest"
OWNER = "OWNER.json"
STALE_SECONDS = 86_400.0


@dataclass(frozen=True, order=True)
class Entry:
    """A committed checkpoint, good or not. `version`: optimizer steps behind it."""

    version: int
    path: Path

    def manifest(self) -> Manifest:
        """Unfit if marker and manifest do not agree, or speak of another version."""
        found = manifests.read(self.path)
        if found.version != self.version:
            raise Unfit(MANIFEST, f"is of step {found.version}, its folder's name of {self.version}")
        return found

    def looks_good(self) -> bool:
        """Marker, manifest and the sizes of all files are right; contents are not read."""
        try:
            self.quick()
        except Unfit:
            return False
        return True

    def quick(self) -> Manifest:
        """As `looks_good`; Unfit with what is wrong."""
        manifest = self.manifest()
        manifests.check_sizes(self.path, manifest)
        return manifest

    def verify(self) -> Manifest:
        """Read everything; Unfit if anything differs from what was written."""
        manifest = self.manifest()
        for name, record in manifest.files.items():
            manifests.check_file(self.path, name, record)
        return manifest


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self) -> list[Entry]:
        """Committed checkpoints, oldest first; no folder at all holds none. OSError if it cannot be read."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.root.iterdir():
                digits = path.name.removeprefix(PREFIX)
                if path.name == f"{PREFIX}{digits}" and digits.isdecimal() and path.is_dir():
                    found.append(Entry(int(digits), path))
        return sorted(found)

    def quarantined(self) -> list[Path]:
        """Folders that were set aside."""
        with contextlib.suppress(FileNotFoundError):
            return sorted((self.root / "quarantine").iterdir())
        return []

    def path_of(self, version: int) -> Path:
        return self.root / f"{PREFIX}{version:08d}"

    def writing(self, version: int, nonce: str) -> Path:
        return self.root / "writing" / f"{PREFIX}{version:08d}-{nonce}"

    def begin(self, folder: Path) -> None:
        """Make the folder of a save; rank 0 alone."""
        folder.mkdir(parents=True)
        _write_durably(folder / OWNER, json.dumps(_this_process()).encode())

    def commit(self, folder: Path, manifest: Manifest) -> Entry:
        """All files are durable: mark it and give it its name; rank 0 alone."""
        data = manifest.to_bytes()
        _write_durably(folder / MANIFEST, data)
        _write_durably(folder / MARKER, manifests.marker_for(data))
        fsync_folder(folder)
        entry = Entry(manifest.version, self.path_of(manifest.version))
        if entry.path.exists():
            self.quarantine(entry, "superseded")
        folder.rename(entry.path)
        (entry.path / OWNER).unlink()
        fsync_folder(self.root)
        pointer = self.root / f"{LATEST}.new"
        _write_durably(pointer, f"{entry.path.name}\n".encode())
        pointer.replace(self.root / LATEST)
        fsync_folder(self.root)
        return entry

    def latest(self) -> Entry | None:
        """The newest that looks good."""
        return next((entry for entry in reversed(self.entries()) if entry.looks_good()), None)

    def quarantine(self, entry: Entry, reason: str) -> Path:
        """Set it aside; returns where it is now. OSError if it cannot be renamed."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
        for target in _numbered(folder / f"{entry.path.name}-{reason}"):
            if not target.exists():
                entry.path.rename(target)
                break
        fsync_folder(folder)
        fsync_folder(self.root)
        return target

    def retain(self, keep_last: int, keep_every: int | None) -> list[int]:
        """Delete what may go, oldest first; returns the versions. Those that look bad are not counted."""
        good = {entry.version: entry for entry in self.entries() if entry.looks_good()}
        gone = expendable(good, keep_last, keep_every)
        for version in gone:
            self._delete(good[version].path)
        return gone

    def discard(self, folder: Path) -> None:
        """Remove what a failed save has left."""
        if folder.exists():
            shutil.rmtree(folder)

    def sweep(self) -> list[str]:
        """Finish interrupted deletions, remove dead left-overs; returns the folders' names. Rank 0 alone."""
        gone = []
        for folder in self._folders("deleting"):
            shutil.rmtree(folder)
            gone.append(folder.name)
        leftovers = self._folders("writing")
        now = self._filesystem_time() if leftovers else 0.0
        for folder in leftovers:
            if _is_dead(folder, now):
                shutil.rmtree(folder)
                gone.append(folder.name)
        return gone

    def _folders(self, kind: str) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in (self.root / kind).iterdir() if path.is_dir())
        return []

    def _delete(self, path: Path) -> None:
        folder = self.root / "deleting"
        folder.mkdir(exist_ok=True)
        target = next(target for target in _numbered(folder / path.name) if not target.exists())
        path.rename(target)
        (target / MARKER).unlink()
        shutil.rmtree(target)

    def _filesystem_time(self) -> float:
        probe = self.root / f".clock-{os.getpid()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def fsync_folder(folder: Path) -> None:
    """Make names in it durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def _this_process() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "started": _started(os.getpid()) or "",
    }


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if it is gone. proc(5), field 22 of stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _is_dead(folder: Path, now: float) -> bool:
    try:
        owner: Mapping[str, object] = json.loads((folder / OWNER).read_text())
        if owner["host"] == socket.gethostname():
            pid = owner["pid"]
            return owner["boot"] != _boot() or not isinstance(pid, int) or _started(pid) != owner["started"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # Killed before it had written who it is: the age decides.
    newest = max((path.stat().st_mtime for path in (folder, *folder.iterdir())), default=now)
    return now - newest > STALE_SECONDS
