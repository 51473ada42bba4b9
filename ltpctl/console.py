"""The only place that prints: tables for people, JSON for programs, one line for an error.

Results go to stdout, all else (progress, notes, errors) to stderr, so that ``--json | jq`` always works.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")

STYLES = {
    "healthy": "green",
    "degraded": "yellow",
    "unhealthy": "bold red",
    "unknown": "magenta",
    "fail": "bold red",
    "warn": "yellow",
    "timeout": "magenta",
    "unsupported": "bright_black",
    "pass": "green",
    "available": "green",
    "cordoned": "red",
    "note": "bright_black",
}
"""Colours by the word that they colour; anything else stays plain."""


def clean(text: str) -> str:
    """Text from elsewhere, safe on a terminal: control characters and direction marks are spelled out."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


@dataclass
class Output:
    """Where a command writes. `json` says that stdout carries one JSON document and nothing else."""

    json: bool = False
    verbose: bool = False
    color: bool | None = None
    """None: as the terminal and NO_COLOR/FORCE_COLOR say."""
    stdout: IO[str] = field(default_factory=lambda: sys.stdout)
    stderr: IO[str] = field(default_factory=lambda: sys.stderr)

    def document(self, value: object) -> None:
        """Print one JSON document (sorted as given, NaN refused: JSON has none)."""
        from pydantic_core import from_json, to_json

        # Laying out the text is what costs: json does it in Python, for thousands of nodes for a second.
        compact = json.dumps(value, allow_nan=False, default=_plain)
        try:
            text = to_json(from_json(compact), indent=2).decode()
        except ValueError:
            # Half surrogates, e.g. of a file name that is not UTF-8: json writes them as escapes.
            text = json.dumps(value, indent=2, default=_plain)
        self.stdout.write(text + "\n")

    def line(self, text: str = "", style: str = "") -> None:
        """One line of the result."""
        self._print(self._console(self.stdout), text, style)

    def note(self, text: str, style: str = "note") -> None:
        """One line beside the result: where something was saved, what to do next."""
        self._print(self._console(self.stderr), text, style)

    def detail(self, text: str) -> None:
        """A note for ``--verbose`` alone."""
        if self.verbose:
            self.note(text)

    def error(self, text: str) -> None:
        self._print(self._console(self.stderr), f"ltpctl: {text}", "bold red" if self.interactive else "")

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        right: frozenset[str] = frozenset(),
        wrap: frozenset[str] = frozenset(),
        style_by: tuple[str, ...] = (),
        widest: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """A table without frames. Columns in `right` align numbers, those in `wrap` may break lines, words
        of those in `style_by` have colours, those in `widest` are at most so many characters wide."""
        from rich.table import Table
        from rich.text import Text

        console = self._console(self.stdout)
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for name in columns:
            table.add_column(
                name.upper(),
                justify="right" if name in right else "left",
                no_wrap=name not in wrap,
                max_width=widest.get(name),
                overflow="fold",
            )
        for row in rows:
            words = ["" if cell is None else str(cell) for cell in row]
            styles = [
                STYLES.get(word, "") if name in style_by else ""
                for name, word in zip(columns, words, strict=True)
            ]
            table.add_row(
                *(Text(clean(word), style=style) for word, style in zip(words, styles, strict=True))
            )
        if self.stdout.isatty():
            console.print(table)
            return
        with console.capture() as capture:
            console.print(table)
        # A pipe needs no padding up to the width of the screen.
        self.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    @property
    def interactive(self) -> bool:
        """stderr is a terminal: progress may move the cursor there."""
        return self.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def width(self) -> int:
        """Characters in a line of stdout."""
        return self._console(self.stdout).width

    def progress_console(self) -> Console:
        return self._console(self.stderr)

    def _print(self, console: Console, text: str, style: str) -> None:
        from rich.text import Text

        console.print(Text(clean(text), style=STYLES.get(style, style)), soft_wrap=True)

    def _console(self, stream: IO[str]) -> Console:
        from rich.console import Console

        width = None if stream.isatty() or "COLUMNS" in os.environ else 200
        return Console(
            file=stream,
            no_color=None if self.color is None else not self.color,
            force_terminal=True if self.color else None,
            highlight=False,
            markup=False,
            emoji=False,
            width=width,
        )


def _plain(value: Any) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
