"""Where every rank's main thread sits, and which ranks sit somewhere else than the rest.

Reads what ``faulthandler`` prints, ``py-spy dump`` (text and ``--json``) and the error file of torch elastic.
Pure: text in, values out; a text that none of the formats fits gives no threads, never an exception.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from recovery.diagnose.ranks import named

MAX_FRAMES = 400
"""Frames kept of one thread; a runaway recursion has a thousand alike."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One Python (or, from py-spy, native) frame; ``line`` is 0 where the source did not say."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{PurePosixPath(self.file).name}:{self.line} ({self.function})"


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread's frames, innermost first. ``name`` and ``holds_gil`` only where the source tells them."""

    name: str
    main: bool
    frames: tuple[Frame, ...]
    holds_gil: bool | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a thread is: the innermost frame of the user's code, and the library call made from there."""

    user: Frame | None
    call: Frame | None
    path: tuple[Frame, ...]
    """The user's frames, innermost first: what makes two ranks stand at the same place."""

    def __str__(self) -> str:
        if self.user is None:
            return f"in {self.call}" if self.call else "no Python stack"
        return f"in {self.call.function} at {self.user}" if self.call else f"in {self.user}"


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks that stand at the same place."""

    ranks: tuple[int, ...]
    standing: Standing

    def __str__(self) -> str:
        who = named(self.ranks) if len(self.ranks) < 4 else f"{len(self.ranks)} ranks ({named(self.ranks)})"
        return f"{who} {self.standing}"


@dataclass(frozen=True, slots=True)
class ElasticError:
    """A rank's last words as torch elastic's ``record`` writes them (``error.json``)."""

    kind: str
    message: str
    time: float | None
    """Seconds since 1970, whole seconds as torch writes them."""
    frames: tuple[Frame, ...]
    """Innermost first, of the exception that ended the rank."""


def places(stacks: Mapping[int, Iterable[Thread]]) -> tuple[Place, ...]:
    """Group ranks by where their main threads stand; the odd ones out (fewest ranks) first."""
    found: dict[Standing, list[int]] = defaultdict(list)
    for rank in sorted(stacks):
        found[standing(stacks[rank])].append(rank)
    return tuple(
        sorted(
            (Place(tuple(ranks), at) for at, ranks in found.items()), key=lambda p: (len(p.ranks), p.ranks)
        )
    )


def standing(threads: Iterable[Thread]) -> Standing:
    """Where the main thread is, library frames folded into the one call that the user's code made."""
    main = next((t for t in threads if t.main), None)
    if main is None or not main.frames:
        return Standing(None, None, ())
    return of_frames(main.frames)


def of_frames(frames: tuple[Frame, ...]) -> Standing:
    """``standing`` for one list of frames, innermost first."""
    first = next((i for i, f in enumerate(frames) if not is_library(f.file)), None)
    if first is None:
        return Standing(None, frames[0] if frames else None, ())
    # Decorators of the library stand between the user's line and what it called: name what it called.
    call = next((f for f in reversed(frames[:first]) if f.function not in _WRAPPERS), None)
    path = tuple(f for f in frames if not is_library(f.file))
    return Standing(frames[first], call, path)


_WRAPPERS = frozenset({"wrapper", "inner", "_call_impl", "_wrapped_call_impl", "decorate_context", "_fn"})
_LIBRARY = re.compile(
    r"/(site|dist)-packages/|/lib(64)?/python\d[\d.]*/|^<frozen |^<__array_function__"
    r"|\.so[.\d]*$|\.(c|cc|cpp|cu)$"
)
# py-spy shortens paths by sys.path, so that the package is the first part.
_PACKAGES = frozenset(
    [
        "accelerate",
        "datasets",
        "deepspeed",
        "fsspec",
        "lightning",
        "megatron",
        "numpy",
        "pytorch_lightning",
        "torch",
        "torchvision",
        "transformers",
        "triton",
    ]
)


def is_library(file: str) -> bool:
    """Whether a frame's file is the interpreter's or an installed package's and not the user's own code."""
    if _LIBRARY.search(file):
        return True
    if file.startswith(("/", "<")):
        return False
    first = file.split("/", 1)[0].removesuffix(".py")
    return first in _PACKAGES or first in sys.stdlib_module_names


# --- reading -------------------------------------------------------------------------------------------


def read_threads(text: str) -> tuple[Thread, ...]:
    """The threads in a text of any known form; of several dumps in one text the last; () when none."""
    if text.lstrip()[:1] in ("[", "{"):
        return _pyspy_json(text)
    if _PYSPY_THREAD.search(text) and "most recent call first" not in text:
        return _pyspy_text(text)
    return _faulthandler(text)


_FAULT_THREAD = re.compile(
    r"^(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[([^\]]*)\])? \(most recent call first\):"
)
_FAULT_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')


def _faulthandler(text: str) -> tuple[Thread, ...]:
    """https://docs.python.org/3/library/faulthandler.html; 3.14 prints the threads' names too."""
    threads: dict[str, tuple[str, list[Frame]]] = {}
    frames: list[Frame] | None = None
    for line in text.splitlines():
        if head := _FAULT_THREAD.match(line):
            if head[1] in threads:  # the next dump in the same file
                threads = {}
            frames = []
            threads[head[1]] = (head[2] or "", frames)
        elif frames is not None and (seen := _FAULT_FRAME.match(line)):
            if len(frames) < MAX_FRAMES:
                frames.append(Frame(seen[3], seen[1], int(seen[2]) if seen[2].isdigit() else 0))
        elif not line.startswith("  "):
            frames = None
    listed = [(name, tuple(frames)) for name, frames in threads.values()]
    main = _main_of(listed)
    return tuple(Thread(name, i == main, frames) for i, (name, frames) in enumerate(listed))


def _main_of(listed: list[tuple[str, tuple[Frame, ...]]]) -> int:
    """A thread's outermost frame tells a started one from the main one; CPython lists the oldest last."""
    for i, (name, frames) in enumerate(listed):
        if name == "MainThread" or (frames and frames[-1].function in ("<module>", "_run_module_as_main")):
            return i
    started = [bool(frames) and frames[-1].function.endswith("_bootstrap") for _, frames in listed]
    alone = [i for i, is_started in enumerate(started) if not is_started]
    return alone[-1] if alone else len(listed) - 1


_PYSPY_THREAD = re.compile(r'^Thread (\S+) \(([a-z+ ]+)\)(?:: "(.*)")?\s*$', re.MULTILINE)
_PYSPY_FRAME = re.compile(r"^ {4}(.+) \((.+?)(?::(\d+))?\)\s*$")


def _pyspy_text(text: str) -> tuple[Thread, ...]:
    """``py-spy dump --pid``, also with ``--locals`` (its lines are indented deeper) and ``--native``."""
    listed: list[tuple[str, str, list[Frame]]] = []
    for line in text.splitlines():
        if head := _PYSPY_THREAD.match(line):
            listed.append((head[3] or "", head[2], []))
        elif (
            listed
            and len(listed[-1][2]) < MAX_FRAMES
            and (seen := _PYSPY_FRAME.match(line))
            and not seen[1].startswith(" ")
        ):
            listed[-1][2].append(Frame(seen[1], seen[2], int(seen[3] or 0)))
    main = _main_of([(name, tuple(frames)) for name, _, frames in listed])
    return tuple(
        Thread(name, i == main, tuple(frames), "gil" in state)
        for i, (name, state, frames) in enumerate(listed)
    )


def _pyspy_json(text: str) -> tuple[Thread, ...]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    listed = [t for t in read if isinstance(t, dict)] if isinstance(read, list) else []
    shaped = [
        (
            t["thread_name"] if isinstance(t.get("thread_name"), str) else "",
            tuple(
                Frame(str(f.get("name", "?")), str(f.get("filename", "?")), line if type(line) is int else 0)
                for f in _dicts(t.get("frames"))[:MAX_FRAMES]
                for line in [f.get("line")]
            ),
            t.get("owns_gil") if isinstance(t.get("owns_gil"), bool) else None,
        )
        for t in listed
    ]
    main = _main_of([(name, frames) for name, frames, _ in shaped])
    return tuple(Thread(name, i == main, frames, gil) for i, (name, frames, gil) in enumerate(shaped))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


_TRACE_FRAME = re.compile(r'^\s*(?:\|\s*)*File "(.*)", line (\d+), in (.*)$')


def read_elastic_error(text: str) -> ElasticError | None:
    """torch elastic's ``error.json``; None when the text is not such a file.

    ``{"message": {"message": ..., "extraInfo": {"py_callstack": ..., "timestamp": ...}}}``, where the outer
    ``message`` may also be a plain string.
    Source: torch/distributed/elastic/multiprocessing/errors/error_handler.py.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    outer = read.get("message") if isinstance(read, dict) else None
    if isinstance(outer, str):
        outer = {"message": outer}
    if not isinstance(outer, dict) or not isinstance(outer.get("message"), str):
        return None
    info = outer.get("extraInfo")
    extra: dict[str, Any] = info if isinstance(info, dict) else {}
    stack = extra.get("py_callstack")
    kind, _, rest = outer["message"].partition(":")
    named_kind = bool(re.fullmatch(r"[A-Za-z_][\w.]*", kind))
    return ElasticError(
        kind=kind if named_kind else "",
        message=rest.strip() if named_kind else outer["message"],
        time=_seconds(extra.get("timestamp")),
        frames=traceback_frames(stack) if isinstance(stack, str) else (),
    )


def traceback_frames(text: str) -> tuple[Frame, ...]:
    """The frames of the last traceback in ``text``, innermost first (Python prints the innermost last)."""
    last = text.rfind("Traceback (most recent call last)")
    seen = [m for line in text[max(last, 0) :].splitlines() if (m := _TRACE_FRAME.match(line))]
    return tuple(Frame(m[3], m[1], int(m[2])) for m in reversed(seen[-MAX_FRAMES:]))


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
