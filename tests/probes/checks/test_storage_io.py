"""Files written and read for real, on storage that lies in known ways; and nothing remains of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from probes.agent.api import Unsupported
from probes.agent.host import Machine
from probes.checks.file_io import PAGE, File, io, shared

ROOT = Path(__file__).resolve().parents[3]


def values(measures: Any) -> dict[str, Any]:
    return {m.metric: m.value for m in measures}


def run(folder: Path, opener: Any = File, **params: Any) -> tuple[dict[str, Any], Machine]:
    host = Machine(params={"paths": [str(folder)], "megabytes": 4, "seconds": 0.1, **params})
    return values(io(host, opener)), host


@pytest.mark.parametrize("direct", [True, False])
def test_sound_storage_gives_back_what_was_written_at_a_rate(tmp_path: Path, direct: bool) -> None:
    found, host = run(tmp_path, lambda folder: File(folder, direct))
    assert found["mismatches"] == found["failed"] == found["hung"] == 0
    for metric in ("write_mb_s", "read_mb_s", "random_write_iops", "random_read_iops", "fsync_ms"):
        assert found[metric] > 0
    assert len(host.evidence) == 1
    assert os.listdir(tmp_path) == []


def test_a_filesystem_without_nameless_files_gets_one_that_loses_its_name_at_once(tmp_path: Path) -> None:
    class Old(File):
        def _open(self, folder: str, direct: bool) -> int:
            real, os.O_TMPFILE = (
                os.O_TMPFILE,
                os.O_DIRECTORY | os.O_RDWR,
            )  # as the kernel of such a filesystem
            try:
                return super()._open(folder, direct)
            finally:
                os.O_TMPFILE = real

    found, _ = run(tmp_path, Old)
    assert found["mismatches"] == 0
    assert found["failed"] == 0
    assert os.listdir(tmp_path) == []


class FlipsOnRead(File):
    """The third read comes back with one bit changed."""

    reads = 0

    def read(self, buffer: memoryview, offset: int) -> int:
        count = super().read(buffer, offset)
        self.reads += 1
        if self.reads == 3:
            buffer[9000] ^= 1 << 4
        return count


class LosesAWrite(File):
    """The second write is acknowledged and never arrives."""

    writes = 0

    def write(self, buffer: memoryview, offset: int) -> None:
        self.writes += 1
        if self.writes != 2:
            super().write(buffer, offset)


class WritesElsewhere(File):
    """A page of the random part lands on its neighbour."""

    def write(self, buffer: memoryview, offset: int) -> None:
        super().write(buffer, offset + PAGE if len(buffer) == PAGE and offset == 0 else offset)


class ServesOldPages(File):
    """Small rewrites are acknowledged and lost: reads give the first generation."""

    def write(self, buffer: memoryview, offset: int) -> None:
        if len(buffer) > PAGE:
            super().write(buffer, offset)


@pytest.mark.parametrize("opener", [FlipsOnRead, LosesAWrite, WritesElsewhere, ServesOldPages])
def test_storage_that_gives_back_other_bytes_is_found(tmp_path: Path, opener: Any) -> None:
    # One mebibyte: so small that the random part meets the page in question.
    found, host = run(
        tmp_path, opener, megabytes=4 if opener in (FlipsOnRead, LosesAWrite) else 1, seconds=0.3
    )
    assert found["mismatches"] >= 1
    assert any("wrote 0x" in line and "differ" in line for line in host.evidence)


def test_a_flipped_bit_is_shown_with_its_place(tmp_path: Path) -> None:
    found, host = run(tmp_path, FlipsOnRead)
    assert found["mismatches"] == 1
    assert "offset 0x202328:" in host.evidence[1]
    assert "bits 0x10 differ; 1 pages" in host.evidence[1]


def test_an_error_of_the_disk_is_the_folder_s_failure_and_not_the_check_s(tmp_path: Path) -> None:
    class Failing(File):
        def sync(self) -> None:
            raise OSError(5, "Input/output error")

    found, host = run(tmp_path, Failing)
    assert found["failed"] == 1
    assert "Input/output error" in host.evidence[0]


def test_a_folder_that_is_not_there_fails_and_does_not_vanish() -> None:
    found, _ = run(Path("/nonexistent"))
    assert found["failed"] == 1


def test_a_write_that_never_ends_is_a_hang_that_names_the_folder(tmp_path: Path) -> None:
    class Hanging(File):
        def sync(self) -> None:
            time.sleep(600)

    host = Machine(params={"paths": [str(tmp_path)], "megabytes": 1, "seconds": 1.0})
    start = time.monotonic()
    found = values(shared(host, Hanging))
    assert time.monotonic() - start < 15
    assert found["hung"] == 1
    assert found["failed"] == 0
    assert host.evidence[0].startswith(str(tmp_path))


def test_a_shared_folder_that_works_passes_and_none_declared_is_said(tmp_path: Path) -> None:
    host = Machine(params={"paths": [str(tmp_path)], "megabytes": 1, "seconds": 20.0})
    found = values(shared(host))
    assert found["hung"] == found["failed"] == found["mismatches"] == 0
    host = Machine(params={})
    assert values(shared(host)) == {"hung": 0}
    assert "no shared folder is declared" in host.evidence[0]


def test_memory_is_not_taken_for_a_disk() -> None:
    host = Machine(params={"candidates": ["/dev/shm"]})
    with pytest.raises(Unsupported, match="no folder there is on a disk"):
        list(io(host))


def test_no_more_than_the_share_of_the_free_space_is_used(tmp_path: Path) -> None:
    found, host = run(tmp_path, share=1e-12)
    assert found["failed"] == 1
    assert "less than 1 MiB" in host.evidence[0]


def test_nothing_remains_when_it_is_killed_in_the_middle(tmp_path: Path) -> None:
    code = (
        "import sys; from probes.agent.host import Machine; from probes.checks.file_io import io\n"
        "print('go', flush=True)\n"
        f"list(io(Machine(params={{'paths': [{str(tmp_path)!r}], 'megabytes': 64, 'seconds': 60}})))\n"
    )
    process = subprocess.Popen([sys.executable, "-B", "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 20

    def holders() -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith(str(tmp_path)):
                found.append(target)
        return found

    while not holders():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    while holders():
        assert time.monotonic() < deadline
    assert os.listdir(tmp_path) == []
