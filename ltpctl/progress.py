"""Progress over many nodes: a moving bar on a terminal, plain lines in a pipe. Always on stderr."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from ltpctl.console import STYLES, Output, clean

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


ALIKE = 5
"""Nodes with the same first finding that are told one by one."""


class NodeProgress:
    """How many nodes are done, which have been running longest, and what was found, as it comes.

    In a pipe: a line for every node with findings, and one for every tenth of the nodes (at most one a
    second).
    What many nodes share is told of the first few only; the table at the end has them all.
    """

    def __init__(self, out: Output, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._total, self._clock = out, total, clock
        self._running: dict[str, float] = {}
        self._done = 0
        self._bad = 0
        self._told: Counter[str] = Counter()
        self._said = 0.0
        self._tenths = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> NodeProgress:
        if self._out.interactive and not self._out.json:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("nodes"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[slowest]}", markup=False),
                console=self._out.progress_console(),
                transient=True,
                refresh_per_second=5,
            )
            self._bar.start()
            self._task = self._bar.add_task("probing", total=self._total, slowest="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, node: str) -> None:
        self._running[node] = self._clock()
        self._show()

    def done(self, node: str, word: str, findings: list[tuple[str, str]]) -> None:
        """A node has ended. `findings`: check and message of what is worth telling; empty if nothing is."""
        self._running.pop(node, None)
        self._done += 1
        if findings:
            self._bad += 1
            check, message = findings[0]
            self._told[check] += 1
            if self._told[check] <= ALIKE:
                more = f"  (+{len(findings) - 1} more)" if len(findings) > 1 else ""
                self._say(f"{node}  {word}  {check}: {message}{more}", word)
            elif self._told[check] == ALIKE + 1:
                self._say(f"{node} and others  {check}: alike; counted from here on", word)
        self._show()

    def _say(self, head: str, word: str) -> None:
        head = " ".join(head.splitlines())
        if self._bar is not None:
            from rich.text import Text

            self._bar.console.print(Text(clean(head), style=STYLES.get(word, "")), soft_wrap=True)
        else:
            self._out.note(head, word)

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            slowest = sorted(self._running.items(), key=lambda item: item[1])[:2]
            now = self._clock()
            text = "  ".join(
                f"{clean(name)} {now - since:.0f}s" for name, since in slowest if now - since >= 2
            )
            self._bar.update(
                self._task,
                completed=self._done,
                description=f"probing, {self._bad} with findings" if self._bad else "probing",
                slowest=f"slowest: {text}" if text else "",
            )
            return
        tenths = 10 * self._done // max(1, self._total)
        if self._total >= 20 and tenths > self._tenths and self._clock() - self._said >= 1.0:
            self._tenths, self._said = tenths, self._clock()
            self._out.note(f"{self._done} of {self._total} nodes done, {self._bad} with findings")
