"""A folder belongs to one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltf.train.lock import NAME, Lock, OutputError, Taken, make

from .runs import ROOT

HOLDER = """
import sys, pathlib
from ltf.train.lock import Lock
with Lock([pathlib.Path(sys.argv[1])], "other"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_has_is_refused_with_its_name(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(Taken, match=f"process {holder.pid} on .*run 'other', since 20"):
        Lock([tmp_path], "mine", patience_seconds=0)


def test_a_holder_that_is_killed_lets_go(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    # Its death may be a moment away; that is what the patience is for.
    with Lock([tmp_path], "mine", patience_seconds=30) as lock:
        assert lock.unlocked == {}


def test_one_that_is_dying_is_waited_for(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            holder.kill()
            holder.wait()

    with Lock([tmp_path], "mine", patience_seconds=60, pause=pause):
        assert len(pauses) == 3


def test_one_run_may_name_a_folder_twice_and_take_it_again_after_it_let_go(tmp_path: Path) -> None:
    with Lock([tmp_path, tmp_path / ".." / tmp_path.name], "mine", patience_seconds=0):
        pass
    with Lock([tmp_path], "mine", patience_seconds=0):
        pass


def test_where_one_of_two_folders_is_taken_the_other_is_let_go(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(Taken):
        Lock([other, tmp_path], "mine", patience_seconds=0)
    Lock([other], "third", patience_seconds=0).close()


def test_what_a_broken_holder_wrote_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff not JSON")
    with Lock([tmp_path], "mine", patience_seconds=0), pytest.raises(Taken, match="process"):
        Lock([tmp_path], "second", patience_seconds=0)


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path: Path) -> None:
    with Lock([tmp_path / "missing"], "mine") as lock:
        [finding] = lock.findings
    assert finding.kind == "run.unlocked"
    assert "missing is not locked (No such file or directory)" in finding.message


def test_a_file_where_a_folder_should_be_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="file is a file"):
            make([place])
    make([tmp_path / "a" / "b", tmp_path / "a" / "b"])
    assert (tmp_path / "a" / "b").is_dir()
