"""Node-set expressions: ``node[001-064,070]``, joined by ``,`` (or) ``!`` (not) ``&`` (and) ``^`` (xor).

The notation and its left-to-right reading are ClusterShell's, which also does the folding. Expanding is
done here for two reasons: the size of an expression is known by arithmetic before anything is built, and
names come in the order in which they were written, so that ranges of names and addresses can be paired.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from inventory.errors import UsageError

MAX_NODES = 100_000
"""Largest node set that is expanded. ``n[1-5000000]`` is refused by arithmetic, before anything is built."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)
"""What a node or group may be called: what SSH, Slurm and file names all bear. The colon is for IPv6."""


def expand(expression: str) -> list[str]:
    """Node names of an expression, each once, in the order written.

    Raises UsageError when it is malformed or larger than MAX_NODES.
    """
    return evaluate(expression, lambda term: term.names())


def fold(names: Iterable[str]) -> str:
    """``node001, node002, node004`` as ``node[001-002,004]``."""
    plain: list[str] = []
    odd: list[str] = []
    for name in names:
        (plain if NAME.fullmatch(name) else odd).append(name)
    if len(plain) < 2:
        return ",".join(plain + odd)
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    return ",".join([str(NodeSet.fromlist(plain, resolver=RESOLVER_NOGROUP)), *odd])


def evaluate(expression: str, resolve: Callable[[Term], Iterable[str]]) -> list[str]:
    """The names that an expression stands for, `resolve` saying what each of its terms stands for."""
    steps = _steps(expression)
    _refuse_large(expression, sum(term.size for _, term in steps))
    chosen: dict[str, None] = {}
    for operator, term in steps:
        names = dict.fromkeys(resolve(term))
        match operator:
            case "!":
                chosen = {name: None for name in chosen if name not in names}
            case "&":
                chosen = {name: None for name in chosen if name in names}
            case "^":
                fresh = {name: None for name in names if name not in chosen}
                chosen = {name: None for name in chosen if name not in names} | fresh
            case _:
                chosen |= names
    return list(chosen)


def declared(expression: str) -> Declaration:
    """The names that a declaration lists: ranges and commas only, nothing expanded yet."""
    steps = _steps(expression)
    if bad := next((operator for operator, _ in steps if operator not in ","), None):
        raise UsageError(
            f"'{expression}': '{bad}' cannot be used where nodes are declared; list ranges with commas"
        )
    for _, term in steps:
        term.check_name(expression)
    return Declaration(expression, tuple(term for _, term in steps))


def pattern(text: str) -> Declaration:
    """Addresses and the like, by range: ``10.0.0.[1-64]``. Brackets without a range (IPv6) are plain text."""
    terms = [_term(text, piece.strip(), literal_brackets=True) for piece in _split_commas(text)]
    return Declaration(text, tuple(terms))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key by which ``node2`` comes before ``node10``."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), part) if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part)


@dataclass(frozen=True, slots=True)
class Declaration:
    """A list of terms in the order written; duplicates are kept."""

    text: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)

    @property
    def plain(self) -> bool:
        """One name, without a range."""
        return len(self.terms) == 1 and self.terms[0].plain

    def names(self) -> list[str]:
        """Every name; UsageError when there are more than MAX_NODES."""
        _refuse_large(self.text, self.size)
        return [name for term in self.terms for name in term.names()]


@dataclass(frozen=True, slots=True)
class Span:
    """One range inside brackets; `width` is the zero padding, 0 for none."""

    first: int
    last: int
    step: int
    width: int

    def __len__(self) -> int:
        return (self.last - self.first) // self.step + 1

    def texts(self) -> Iterator[str]:
        for number in range(self.first, self.last + 1, self.step):
            yield str(number).zfill(self.width)


@dataclass(frozen=True, slots=True)
class Term:
    """One operand: text with any number of bracketed ranges."""

    text: str
    parts: tuple[str | tuple[Span, ...], ...]

    @property
    def plain(self) -> bool:
        return all(isinstance(part, str) for part in self.parts)

    @property
    def size(self) -> int:
        return math.prod(1 if isinstance(part, str) else sum(map(len, part)) for part in self.parts)

    def names(self) -> list[str]:
        """Every name, in the order written; the leftmost bracket varies slowest."""
        if self.plain:
            return [self.text]
        choices = [
            (part,) if isinstance(part, str) else tuple(text for span in part for text in span.texts())
            for part in self.parts
        ]
        return ["".join(pieces) for pieces in itertools.product(*choices)]

    def without(self, prefix: str) -> Term:
        """The term less its first characters, e.g. the ``@`` of a group."""
        return _term(self.text, self.text.removeprefix(prefix))

    def check_name(self, expression: str) -> None:
        """UsageError when what this expands to could not be names."""
        sample = "".join(part if isinstance(part, str) else "0" for part in self.parts)
        if not NAME.fullmatch(sample):
            start = "" if self.text == expression else f"'{expression}': "
            raise UsageError(
                f"{start}'{self.text}' is not a name; names are letters, digits and '_', "
                "then also '-', '.' and ':'"
            )


_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_SPAN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18})(?:/([0-9]{1,18}))?)?", re.ASCII)


def _steps(expression: str) -> list[tuple[str, Term]]:
    """(operator, operand) pairs, left to right; the first operator is empty."""
    steps: list[tuple[str, Term]] = []
    operator, start, depth = "", 0, 0
    pending = True

    def take(end: int) -> None:
        nonlocal operator, pending
        if text := expression[start:end].strip():
            steps.append((operator, _term(expression, text)))
            operator, pending = ",", False

    for at, char in enumerate(expression):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        elif depth == 0 and (char in ",!&^" or char.isspace()):
            take(at)
            start = at + 1
            if not char.isspace():
                if pending:
                    raise UsageError(f"'{expression}': nothing stands before '{char}' at position {at + 1}")
                operator, pending = char, True
    take(len(expression))
    if not steps:
        raise UsageError("an empty node expression; write names, e.g. node[001-064]")
    if pending:
        raise UsageError(f"'{expression}': nothing follows the last '{operator}'")
    return steps


def _term(expression: str, text: str, literal_brackets: bool = False) -> Term:
    parts: list[str | tuple[Span, ...]] = []
    at = 0
    for found in _BRACKETS.finditer(text):
        inside = found[1]
        if literal_brackets and not re.fullmatch(r"[0-9,/ -]*", inside):
            continue
        if found.start() > at:
            parts.append(text[at : found.start()])
        parts.append(tuple(_span(expression, item.strip()) for item in inside.split(",")))
        at = found.end()
    if at < len(text):
        parts.append(text[at:])
    if not literal_brackets and any(isinstance(part, str) and re.search(r"[\[\]]", part) for part in parts):
        raise UsageError(f"'{expression}': the brackets of '{text}' do not match")
    return Term(text, tuple(parts))


def _span(expression: str, item: str) -> Span:
    found = _SPAN.fullmatch(item)
    if not found:
        what = f"'{item}' is not a range" if item else "a range is empty"
        raise UsageError(f"'{expression}': {what}; write numbers inside the brackets, e.g. [1-8,12]")
    first, last, step = found[1], found[2] or found[1], int(found[3] or 1)
    if step < 1:
        raise UsageError(f"'{expression}': the step of '{item}' must be at least 1")
    if int(last) < int(first):
        raise UsageError(f"'{expression}': '{item}' runs backwards; write [{last}-{first}]")
    padded = (first[0] == "0" and len(first) > 1) or (last[0] == "0" and len(last) > 1)
    if padded and len(first) != len(last):
        width = max(len(first), len(last))
        fixed = f"[{first.zfill(width)}-{last.zfill(width)}]"
        raise UsageError(f"'{expression}': the two ends of '{item}' have different widths; write {fixed}")
    return Span(int(first), int(last), step, len(first) if padded else 0)


def _split_commas(text: str) -> list[str]:
    """Split at commas outside brackets."""
    pieces, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth <= 0:
            pieces.append(text[start:at])
            start = at + 1
    return [*pieces, text[start:]]


def _refuse_large(expression: str, size: int) -> None:
    if size > MAX_NODES:
        shown = expression if len(expression) <= 60 else expression[:57] + "..."
        raise UsageError(f"'{shown}' stands for {size:,} nodes; at most {MAX_NODES:,} are taken at once")
