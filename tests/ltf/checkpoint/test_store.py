"""What stays, what goes, and what a disk that refuses costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ltf.checkpoint.manifest import MARKER
from ltf.checkpoint.retention import expendable
from ltf.checkpoint.saver import Saved
from ltf.checkpoint.store import OWNER, Store
from ltf.findings import Finding
from tests.ltf import ranks
from tests.ltf.checkpoint.toy import Toy, flip_bit, join, saver


@pytest.mark.parametrize(
    ("good", "last", "every", "gone"),
    [
        ([], 2, None, []),
        ([10], 2, None, []),
        ([10, 20], 2, None, []),
        ([10, 20, 30, 40], 2, None, [10, 20]),
        ([10, 20, 30, 40], 3, None, [10]),
        ([10, 20, 30, 40, 50], 2, 20, [10, 30]),
        ([40, 30, 20, 10], 2, 10, []),
        ([10, 20, 30], 1, None, [10]),
        ([0, 10, 20, 30], 2, 100, [10]),
    ],
)
def test_the_newest_stay_and_multiples_for_ever(
    good: list[int], last: int, every: int | None, gone: list[int]
) -> None:
    assert expendable(good, last, every) == gone


def _checkpoints(folder: Path, versions: list[int], **options: object) -> None:
    toy = Toy()
    with saver(folder, toy, **options) as writing:
        for version in versions:
            writing.before_update()
            writing.finished_update(version, {})
            writing.request()
            writing.wait()


def test_old_ones_go_only_after_a_new_one_is_committed(tmp_path: Path) -> None:
    _checkpoints(tmp_path, [10, 20, 30, 40, 50], keep_last=2, keep_every=20)
    assert [entry.version for entry in Store(tmp_path).entries()] == [20, 40, 50]
    assert (tmp_path / "latest").read_text() == "step-00000050\n"
    assert not list((tmp_path / "deleting").iterdir())
    assert not list((tmp_path / "writing").iterdir())


def test_bad_ones_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    _checkpoints(tmp_path, [10, 20, 30, 40], keep_last=4)
    (tmp_path / "step-00000040" / MARKER).unlink()
    os.truncate(tmp_path / "step-00000030" / "__0_0.distcp", 100)
    assert Store(tmp_path).retain(2, None) == []
    _checkpoints(tmp_path, [50], keep_last=2)
    assert [entry.version for entry in Store(tmp_path).entries()] == [20, 30, 40, 50]
    latest = Store(tmp_path).latest()
    assert latest is not None
    assert latest.version == 50


def test_an_interrupted_deletion_leaves_nothing_that_reads_as_good_and_is_finished_later(
    tmp_path: Path,
) -> None:
    _checkpoints(tmp_path, [10, 20], keep_last=2)
    store = Store(tmp_path)
    (tmp_path / "deleting").mkdir(exist_ok=True)
    (tmp_path / "step-00000010").rename(tmp_path / "deleting" / "step-00000010")
    assert [entry.version for entry in store.entries()] == [20]
    assert store.sweep() == ["step-00000010"]


def test_what_another_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, dead, rebooted, nobodys = (store.writing(1, name) for name in ("a", "b", "c", "d"))
    for folder in (mine, dead, rebooted, nobodys):
        store.begin(folder)
    with subprocess.Popen(["true"]) as process:
        process.wait()
        owner = json.loads((dead / OWNER).read_text())
        (dead / OWNER).write_text(json.dumps(owner | {"pid": process.pid}))
    (rebooted / OWNER).write_text(json.dumps(owner | {"boot": "another"}))
    (nobodys / OWNER).unlink()
    assert store.sweep() == [dead.name, rebooted.name]
    assert mine.is_dir()
    for path in (nobodys, *nobodys.iterdir()):
        os.utime(path, (1, 1))
    assert store.sweep() == [nobodys.name]


def test_the_same_step_again_sets_the_first_aside(tmp_path: Path) -> None:
    _checkpoints(tmp_path, [10])
    _checkpoints(tmp_path, [10])
    assert [entry.version for entry in Store(tmp_path).entries()] == [10]
    assert [path.name for path in Store(tmp_path).quarantined()] == ["step-00000010-superseded"]


def test_two_of_one_name_can_be_set_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        _checkpoints(tmp_path, [10])
        (entry,) = Store(tmp_path).entries()
        assert (
            Store(tmp_path).quarantine(entry, "bad").name
            == ("step-00000010-bad", "step-00000010-bad-2")[number - 1]
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small filesystem needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_full_disk_costs_a_finding_and_the_next_save_works(small_disk: Path) -> None:
    for results in ranks.run(_fill_the_disk, 2, small_disk):
        (failed, saved) = results
        assert isinstance(failed, Finding)
        assert failed.kind == "checkpoint.failed"
        assert "No space left on device" in failed.message
        assert "bytes free" in failed.message
        problems = failed.evidence["problems"]
        assert isinstance(problems, list)
        (first, *_) = problems
        assert isinstance(first, dict)
        assert first["errno"] == errno.ENOSPC
        assert str(first["path"]).startswith(str(small_disk))
        assert isinstance(first["free"], int)
        assert isinstance(saved, Saved)
    assert not list((small_disk / "checkpoints" / "writing").iterdir())
    assert [entry.version for entry in Store(small_disk / "checkpoints").entries()] == [2]


def _fill_the_disk(disk: Path) -> list[Saved | Finding]:
    join()
    toy = Toy()
    rank = torch.distributed.get_rank()
    results: list[Saved | Finding] = []
    if rank == 0:
        (disk / "other").write_bytes(bytes(1_990_000))
    with saver(disk / "checkpoints", toy) as writing:
        for version in (1, 2):
            torch.distributed.barrier()
            writing.before_update()
            writing.finished_update(version, {})
            writing.request()
            writing.wait()
            results += writing.poll()
            if rank == 0 and version == 1:
                (disk / "other").unlink()
    return results


def test_a_disk_that_fills_in_the_middle_of_a_file_is_told_as_that(small_disk: Path) -> None:
    toy = Toy()
    (small_disk / "other").write_bytes(bytes(2_020_000))
    with saver(small_disk / "checkpoints", toy) as writing:
        writing.finished_update(1, {})
        writing.request()
        writing.wait()
        (failed,) = writing.poll()
    assert isinstance(failed, Finding)
    assert "No space left on device" in failed.message
    assert not list((small_disk / "checkpoints" / "writing").iterdir())


def test_a_disk_that_became_read_only_costs_a_finding(small_disk: Path) -> None:
    toy = Toy()
    with saver(small_disk / "checkpoints", toy) as writing:
        writing.finished_update(1, {})
        writing.request()
        writing.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        writing.before_update()
        writing.finished_update(2, {})
        writing.request()
        writing.wait()
        saved, failed = writing.poll()
        assert isinstance(saved, Saved)
        assert isinstance(failed, Finding)
        assert "Read-only file system" in failed.message
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        writing.before_update()
        writing.finished_update(3, {})
        writing.request()
        writing.wait()
        (again,) = writing.poll()
        assert isinstance(again, Saved)


def test_on_a_read_only_disk_a_bad_checkpoint_is_passed_over_where_it_lies(small_disk: Path) -> None:
    from ltf.checkpoint.load import Loaded, load

    _checkpoints(small_disk, [1, 2])
    flip_bit(small_disk / "step-00000002" / "__0_0.distcp")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    loaded = load(Store(small_disk), Toy().state, seed=0)
    assert isinstance(loaded, Loaded)
    assert loaded.version == 1
    assert "could not be set aside" in loaded.findings[0].message
