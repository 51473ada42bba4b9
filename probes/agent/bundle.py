"""Controller side: a list of checks becomes what travels to a node.

    requests = [check_request("host.memory", spec), ...]
    bundled = bundle(requests, budget=60.0)              # cached: 2,048 nodes of one kind share it
    nonce = fresh_nonce()
    Command(argv=bundled.argv(nonce, node.python), stdin=bundled.payload, self_watching=True)

What comes back is read by `probes.agent.frames.Decoder`.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TypeGuard

from probes.agent.bootstrap import command_line
from probes.catalogue import CheckSpec

ENTRY = "probes.agent.main"
LOADER = "probes.agent.loader"
DECLARED = ("probes.checks.declared", "collect")


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """One check as the agent is asked for it. Checks of one `lane` run one after another, in one process."""

    check: str
    module: str
    function: str
    timeout: float
    lane: str
    loads: bool = False
    needs: str = ""
    params: Mapping[str, object] = field(default_factory=dict)

    def to_wire(self) -> dict[str, object]:
        return {
            "check": self.check,
            "module": self.module,
            "function": self.function,
            "timeout": self.timeout,
            "loads": self.loads,
            "lane": self.lane,
            "needs": self.needs,
            "params": dict(self.params),
        }


@dataclass(frozen=True, slots=True)
class Watched:
    """A check whose measures are read before, between and after the checks that load the node."""

    request: CheckRequest
    counters: Mapping[str, str] = field(default_factory=dict)
    """The collector's metric -> name of the growth in the watch's record."""
    peaks: Mapping[str, str] = field(default_factory=dict)
    """The collector's metric -> name of the highest value seen."""


@dataclass(frozen=True, slots=True)
class WatchRequest:
    collect: tuple[Watched, ...]
    check: str = "load.counters"
    every: float = 0.0
    """Seconds between samples while a check runs; 0: only between checks."""

    def to_wire(self) -> dict[str, object]:
        collect = [
            {**w.request.to_wire(), "counters": dict(w.counters), "peaks": dict(w.peaks)}
            for w in self.collect
        ]
        return {"check": self.check, "every": self.every, "collect": collect}


@dataclass(frozen=True, slots=True)
class Bundle:
    payload: bytes
    """For the agent's stdin; the same for every node that is asked the same."""
    checks: tuple[str, ...]
    """Names of which a record is expected, the watch's included."""
    budget: float

    def argv(self, nonce: str, python: str = "python3") -> tuple[str, ...]:
        return command_line(nonce, len(self.payload), python)


def fresh_nonce() -> str:
    """16 hex digits that tell this run's frames from whatever else a node prints."""
    return secrets.token_hex(8)


def check_request(
    name: str, spec: CheckSpec, params: Mapping[str, object] | None = None, timeout: float | None = None
) -> CheckRequest:
    """What to send for a check of the catalogue. `params` replace the catalogue's one by one."""
    family = name.partition(".")[0]
    merged: dict[str, object] = {**spec.params, **(params or {})}
    # ``events`` is of the family's own module, ``kernel.events`` of the one beside it.
    beside, _, function = (spec.collect or "").rpartition(".")
    module = f"probes.checks.{beside or family}"
    if spec.collect is None:
        module, function = DECLARED
        merged["declared"] = {
            "command": list(spec.command) if spec.command else None,
            "file": spec.file,
            "shell": spec.shell,
            "timeout": timeout or spec.timeout,
            "parse": spec.parse.model_dump(exclude_defaults=True) if spec.parse else None,
            "metrics": {metric: m.unit for metric, m in spec.metrics.items()},
        }
    return CheckRequest(
        check=name,
        module=module,
        function=function,
        timeout=timeout or spec.timeout,
        lane=family,
        loads=spec.loads,
        needs=spec.needs,
        params=merged,
    )


def bundle(
    checks: Sequence[CheckRequest],
    watch: WatchRequest | None = None,
    budget: float = 300.0,
    sources: Mapping[str, str] | None = None,
) -> Bundle:
    """The payload for these checks; `budget` is seconds for all of them together.

    `sources`: text of check modules that are not in this package, by their names below ``probes.checks``.
    Raises ValueError for a name that is asked twice, or for params that JSON cannot carry.
    """
    names = [c.check for c in checks] + ([watch.check] if watch else [])
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"asked more than once: {', '.join(sorted(twice))}")
    request: dict[str, object] = {"budget": budget, "checks": [c.to_wire() for c in checks]}
    if watch:
        request["watch"] = watch.to_wire()
    entries = [*checks, *(w.request for w in watch.collect)] if watch else checks
    text = json.dumps(request, separators=(",", ":"), sort_keys=True, allow_nan=False)
    modules = tuple(sorted({e.module for e in entries}))
    return Bundle(_payload(text, modules, tuple(sorted((sources or {}).items()))), tuple(names), budget)


@functools.lru_cache(maxsize=64)
def _payload(request: str, check_modules: tuple[str, ...], own: tuple[tuple[str, str], ...]) -> bytes:
    texts = dict(own)
    imported = [name for text in texts.values() for name in _imports(text)]
    for name in needed((LOADER, ENTRY, *check_modules, *imported)):
        texts.setdefault(name, _source(name))
    modules = json.dumps({name: bare(text) for name, text in texts.items()}, separators=(",", ":"))
    return zlib.compress(f'{{"v":1,"modules":{modules},"request":{request}}}'.encode(), 9)


def needed(modules: Iterable[str]) -> list[str]:
    """These modules and all of ours that they import, at any depth.

    A module that does not exist stays out: the agent then says so in the record of the check that named it.
    """
    found: dict[str, None] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        if name not in found and _source(name):
            found[name] = None
            queue += _imports(_source(name))
    return sorted(found)


def bare(source: str) -> str:
    """A module without comments and docstrings. Every statement stays on its line: errors name it.

    Comments behind a statement stay as well: they are few, and finding them takes longer than all the rest.
    """
    return _reduced(source)[0]


def _imports(source: str) -> tuple[str, ...]:
    return _reduced(source)[1]


@functools.cache
def _reduced(source: str) -> tuple[str, tuple[str, ...]]:
    """The bare text, and the names of ours that it imports."""
    lines = io.StringIO(source).readlines()
    imported: list[str] = []
    docstrings: list[ast.Expr] = []
    in_text: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif _is_docstring(node):
            docstrings.append(node)
        elif isinstance(node, ast.Constant | ast.JoinedStr):
            # Lines that begin within it, counted from 0: what looks like a comment there is none.
            in_text.update(range(node.lineno, node.end_lineno or node.lineno))
    for index, line in enumerate(lines):
        if index not in in_text and line.lstrip().startswith("#"):
            lines[index] = "\n"
    for node in docstrings:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        # A number in its place keeps a block that is nothing else from being empty.
        lines[first : last + 1] = [lines[first][: node.col_offset] + "0\n"] + ["\n"] * (last - first)
    ours = tuple(name for name in imported if name.startswith(("probes.agent.", "probes.checks.")))
    return "".join(lines), ours


def _is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@functools.cache
def _source(module: str) -> str:
    """Text of one of our modules; "" if there is none of that name."""
    package, _, name = module.rpartition(".")
    if package not in ("probes.agent", "probes.checks"):
        return ""
    file = resources.files("probes") / package.rpartition(".")[2] / f"{name}.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""
