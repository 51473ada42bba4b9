"""Last words of real Python processes, and those of collectives that lost a peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recovery.blame import Blame
from recovery.supervise.words import Cause, Words, last_words

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:24019"


def said(folder: Path, program: str) -> str:
    """What Python writes when it runs this program."""
    script = folder / "train.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def words_of(folder: Path, program: str) -> Words:
    words = last_words(said(folder, program))
    assert words is not None
    return words


@pytest.mark.parametrize(
    ("program", "line", "exception", "cause"),
    [
        ("import math\nimport nowhere", 2, "ModuleNotFoundError", Cause("code.import", Blame.USER, False)),
        ("from math import cosine", 1, "ImportError", Cause("code.import", Blame.USER, False)),
        ("a = 1\nif a\n  pass", 2, "SyntaxError", Cause("code.syntax", Blame.USER, False)),
        ("\n\nopen('nowhere.bin')", 3, "FileNotFoundError", Cause("data.missing_file", Blame.USER, False)),
        ("def f():\n    {}['x']\nf()", 2, "KeyError", Cause("code.exception", Blame.USER)),
        ("raise OSError(28, 'No space left on device')", 1, "OSError", Cause("storage.full", Blame.PLATFORM)),
        ("raise OSError(98, 'Address already in use')", 1, "OSError", Cause("port.taken", Blame.PLATFORM)),
        ("raise MemoryError", 1, "MemoryError", Cause("memory.host_oom", Blame.USER)),
    ],
)
def test_the_exception_and_its_place_in_the_users_code_are_found(
    tmp_path: Path, program: str, line: int, exception: str, cause: Cause
) -> None:
    words = words_of(tmp_path, program)
    assert words.exception == exception
    assert words.place == f"{tmp_path / 'train.py'}:{line} {exception}"
    assert words.cause == cause
    assert not words.consequence


def test_an_error_raised_in_a_library_is_placed_where_the_users_code_called_it(tmp_path: Path) -> None:
    words = words_of(tmp_path, "import json\n\njson.loads('{')")
    assert (words.exception, words.place) == (
        "json.decoder.JSONDecodeError",
        f"{tmp_path / 'train.py'}:3 JSONDecodeError",
    )


def test_of_a_chain_the_error_that_is_no_consequence_counts(tmp_path: Path) -> None:
    program = f"try:\n    1 / 0\nfinally:\n    raise RuntimeError({GLOO!r})"
    assert words_of(tmp_path, program).exception == "ZeroDivisionError"


def test_an_error_that_was_handled_long_before_is_not_the_last_word(tmp_path: Path) -> None:
    handled = "import traceback\ntry:\n    1 / 0\nexcept Exception:\n    traceback.print_exc()\n"
    program = f"{handled}raise RuntimeError({GLOO!r})"
    words = words_of(tmp_path, program)
    assert (words.exception, words.consequence) == ("RuntimeError", True)


def test_lines_that_torch_marks_with_the_rank_are_read_too(tmp_path: Path) -> None:
    text = said(tmp_path, "def f():\n    raise ValueError('no such thing')\nf()")
    marked = "".join(f"[rank3]: {line}\n" for line in text.splitlines())
    words = last_words(f"step 3 loss 1.5\n{marked}")
    assert words is not None
    assert (words.exception, words.message) == ("ValueError", "no such thing")


def test_a_line_that_tells_of_lost_peers_is_a_consequence_without_a_traceback() -> None:
    words = last_words("step 3\nerror: rank 0 of 2 (n1, cpu) lost the other ranks: one of them ended\n")
    assert words is not None
    assert words.consequence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step 12 loss 3.1\nstep 13 loss 3.0\n",
        "checking ECC: ok, no uncorrectable errors\nerror_rate: 0\n",
    ],
)
def test_output_without_an_error_has_no_last_words(text: str) -> None:
    assert last_words(text) is None


def test_a_bare_device_error_is_nobodys_yet_and_a_failed_allocation_the_users() -> None:
    frame = 'Traceback (most recent call last):\n  File "/job/train.py", line 3, in <module>\n    f()\n'
    bare = last_words(
        frame + "torch.AcceleratorError: CUDA error: an illegal memory access was encountered\n"
    )
    full = last_words(frame + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert bare is not None
    assert full is not None
    assert bare.cause == Cause("device.error", Blame.UNKNOWN)
    assert full.cause == Cause("memory.device_oom", Blame.USER)
