"""Where ranks stand, from stacks that real processes printed and from documented formats."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.diagnose.stacks import (
    Frame,
    Thread,
    is_library,
    places,
    read_elastic_error,
    read_threads,
    standing,
    traceback_frames,
)

PROGRAM = """\
import faulthandler, sys, threading

def loader():
    threading.Event().wait(60)

def fetch(ready):
    return ready.get()

def train(ready):
    return fetch(ready)

import queue
threading.Thread(target=loader, daemon=True).start()
for _ in range(2):
    faulthandler.dump_traceback_later(0.2, file=sys.stderr)
    try:
        train(queue.Queue()) if False else queue.Queue().get(timeout=0.5)
    except queue.Empty:
        faulthandler.cancel_dump_traceback_later()
faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
"""


def _faulthandler_output(tmp_path: Path, program: str) -> str:
    script = tmp_path / "train.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    return done.stderr


def test_the_last_of_several_faulthandler_dumps_is_read_with_its_main_thread(tmp_path: Path) -> None:
    output = _faulthandler_output(tmp_path, PROGRAM)
    assert output.count("Timeout (") == 2
    threads = read_threads("step 12 loss 3.4\n" + output)
    assert len(threads) == 2
    at = standing(threads)
    # The last dump stands at the last line of the program, the ones before it waited in the queue.
    assert at.user is not None
    assert (at.user.function, Path(at.user.file).name) == ("<module>", "train.py")
    assert at.user.line == len(PROGRAM.splitlines())
    other = next(t for t in threads if not t.main)
    assert "loader" in [f.function for f in other.frames]


def test_a_wait_in_the_library_is_folded_into_the_call_that_the_user_made(tmp_path: Path) -> None:
    program = (
        "import faulthandler, queue\n"
        "def fetch():\n"
        "    queue.Queue().get(timeout=60)\n"
        "faulthandler.dump_traceback_later(0.2, exit=True)\n"
        "fetch()\n"
    )
    at = standing(read_threads(_faulthandler_output(tmp_path, program)))
    assert str(at) == "in get at train.py:3 (fetch)"


def test_a_fatal_errors_stack_is_read(tmp_path: Path) -> None:
    program = "import faulthandler, os\nfaulthandler.enable()\ndef crash():\n    os.abort()\ncrash()\n"
    output = _faulthandler_output(tmp_path, program)
    assert output.startswith("Fatal Python error")
    assert str(standing(read_threads(output)).user) == "train.py:4 (crash)"


def _stack(*frames: tuple[str, str, int]) -> tuple[Thread, ...]:
    return (Thread("MainThread", True, tuple(Frame(*f) for f in frames)),)


def test_the_odd_ranks_out_come_first() -> None:
    library = "/x/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    waiting = _stack(("all_reduce", library, 2806), ("wrapper", library, 81), ("step", "/job/train.py", 88))
    loading = _stack(
        ("read", "/usr/lib/python3.11/gzip.py", 301),
        ("load", "/job/data.py", 31),
        ("step", "/job/train.py", 80),
    )
    stacks = {r: loading if r == 7 else waiting for r in range(511)}
    found = places({**stacks, 511: ()})
    assert [str(p) for p in found] == [
        "rank 7 in read at data.py:31 (load)",
        "rank 511 no Python stack",
        "510 ranks (ranks 0-6,8-510) in all_reduce at train.py:88 (step)",
    ]


def test_ranks_at_the_same_line_by_different_ways_stand_apart() -> None:
    by_train = _stack(("sync", "/job/sync.py", 9), ("train", "/job/train.py", 10))
    by_eval = _stack(("sync", "/job/sync.py", 9), ("evaluate", "/job/train.py", 50))
    assert [p.ranks for p in places({0: by_train, 1: by_train, 2: by_eval})] == [(2,), (0, 1)]


# The shape is py-spy's (https://github.com/benfred/py-spy, `dump`); names and numbers are ours.
PYSPY = """\
Process 4242: python train.py --config run.yaml
Python v3.11.7 (/usr/bin/python3.11)

Thread 4242 (active): "MainThread"
    clock_nanosleep (libc.so.6)
    all_reduce (torch/distributed/distributed_c10d.py:2806)
        Arguments:
            tensor: <Tensor at 0x7f5f1842e190>
            op: "File (train.py:1)"
    wrapper (torch/distributed/c10d_logger.py:81)
    step (train.py:88)
        Locals:
            loss: 3.25
    <module> (train.py:120)
    0x7f5f18a4524a (libc.so.6)
Thread 4300 (idle): "loader"
    Condition.wait (threading.py:331)
    worker (train.py:4)
    Thread._bootstrap (threading.py:1002)
Thread 4301 (active+gil): "spinner"
    spin (train.py:9)
"""


def test_py_spys_text_is_read_with_arguments_locals_and_native_frames() -> None:
    threads = read_threads(PYSPY)
    assert [(t.name, t.main, t.holds_gil) for t in threads] == [
        ("MainThread", True, False),
        ("loader", False, False),
        ("spinner", False, True),
    ]
    assert str(standing(threads)) == "in all_reduce at train.py:88 (step)"
    assert len(threads[0].frames) == 6


def test_py_spys_json_says_the_same_as_its_text() -> None:
    def frame(name: str, file: str, line: int) -> dict:
        return {
            "name": name,
            "filename": file,
            "module": None,
            "short_filename": file,
            "line": line,
            "locals": None,
        }

    library = "/x/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    made = [
        {
            "pid": 4242,
            "thread_id": 1,
            "thread_name": "loader",
            "active": False,
            "owns_gil": True,
            "frames": [frame("worker", "/job/train.py", 4)],
        },
        {
            "pid": 4242,
            "thread_id": 2,
            "thread_name": "MainThread",
            "active": True,
            "owns_gil": False,
            "frames": [frame("all_reduce", library, 2806), frame("step", "/job/train.py", 88)],
        },
    ]
    threads = read_threads(json.dumps(made))
    assert str(standing(threads)) == "in all_reduce at train.py:88 (step)"
    assert [t.holds_gil for t in threads] == [True, False]


@pytest.mark.torch
def test_a_real_error_file_of_torch_elastic_is_read(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    script, error = tmp_path / "train.py", tmp_path / "error.json"
    script.write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "def load():\n"
        "    raise FileNotFoundError('no shard: part-7')\n"
        "@record\n"
        "def main():\n"
        "    load()\n"
        "main()\n"
    )
    environment = {"TORCHELASTIC_ERROR_FILE": str(error), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=100, check=False)
    read = read_elastic_error(error.read_text())
    assert read is not None
    assert (read.kind, read.message) == ("FileNotFoundError", "no shard: part-7")
    assert str(read.frames[0]) == "train.py:3 (load)"
    assert read.time is not None
    assert read.time > 1_600_000_000


def test_an_error_file_with_a_bare_message_is_read() -> None:
    read = read_elastic_error('{"message": "Signal 9 (SIGKILL) received by PID 77"}')
    assert read is not None
    assert (read.kind, read.message, read.frames) == ("", "Signal 9 (SIGKILL) received by PID 77", ())
    assert read_elastic_error('{"loss": 1}') is None
    assert read_elastic_error("not json") is None


def test_of_chained_tracebacks_the_last_is_the_one_that_ended_it() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "a.py", line 1, in inner\n    x()\nKeyError: 1\n\n'
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n"
        '  File "a.py", line 9, in outer\n    y()\n'
        '  File "b.py", line 2, in last\n    z()\nValueError: 2\n'
    )
    assert [str(f) for f in traceback_frames(text)] == ["b.py:2 (last)", "a.py:9 (outer)"]


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("/opt/venv/lib/python3.12/site-packages/torch/nn/modules/module.py", True),
        ("/usr/lib/python3/dist-packages/numpy/core.py", True),
        ("/usr/lib/python3.11/threading.py", True),
        ("<frozen importlib._bootstrap>", True),
        ("threading.py", True),
        ("torch/nn/modules/module.py", True),
        ("libcuda.so.1", True),
        ("/home/me/train.py", False),
        ("train.py", False),
        ("/home/me/torch/train.py", False),
        ("<string>", False),
    ],
)
def test_library_files_are_told_from_the_users(file: str, library: bool) -> None:
    assert is_library(file) is library


@settings(max_examples=100, deadline=None)
@given(
    st.text() | st.sampled_from([PYSPY, "[1, {}]", '[{"frames": [{"line": "x"}, 3]}]', "[" * 5000]), st.data()
)
def test_a_text_of_any_kind_never_breaks_the_reader(text: str, data: st.DataObject) -> None:
    cut = text[: data.draw(st.integers(0, len(text)))]
    places({0: read_threads(text), 1: read_threads(cut)})
    read_elastic_error(cut)
    assert not re.search("Traceback", str(places({0: read_threads(cut)})))
