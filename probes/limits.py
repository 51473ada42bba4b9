"""Limits: the healthy condition of one value, parsed from a short text, held as a value, never evaluated.

``== 0``, ``!= off``, ``< 5``, ``<= 5``, ``> 5``, ``>= 5``, ``in 16, 32``, ``between 1 and 5``,
``within 5% of 100``, ``matches REGEX`` (the whole value), ``known`` (any value but null).
A word in double quotes is text even where it looks like a number or a truth value: ``== "550"``.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from functools import lru_cache

from probes.model import Value

MAX_TEXT = 128
"""Longest text, in characters, that ``matches`` looks at. Longer values cannot be judged."""
MAX_PATTERN = 200
MAX_WAYS = 1e9
"""Four open-ended repeats in a row: at most MAX_TEXT ** 4 / 24 steps, a fraction of a second."""

Operand = float | int | str | bool


class LimitError(ValueError):
    """A limit's text is not in the grammar. The message is one clause for a person."""


class Operator(enum.StrEnum):
    EQUAL = "=="
    UNEQUAL = "!="
    LESS = "<"
    AT_MOST = "<="
    MORE = ">"
    AT_LEAST = ">="
    IN = "in"
    BETWEEN = "between"
    WITHIN = "within"
    MATCHES = "matches"
    KNOWN = "known"


@dataclass(frozen=True, slots=True)
class Limit:
    """One healthy condition. Build it with :func:`parse`."""

    operator: Operator
    operands: tuple[Operand, ...] = ()
    """Numbers, truth values or text; ``within`` holds (percent, centre)."""

    def holds(self, value: Value) -> bool | None:
        """Whether `value` is healthy. None: it cannot be told (no value, not finite, or of another kind)."""
        operator, operands = self.operator, self.operands
        if operator is Operator.KNOWN:
            return not _nothing(value)
        if value is None or _nothing(value):
            return None
        match operator:
            case Operator.EQUAL:
                return _same(value, operands[0])
            case Operator.UNEQUAL:
                same = _same(value, operands[0])
                return None if same is None else not same
            case Operator.IN:
                answers = [_same(value, operand) for operand in operands]
                return True if True in answers else (False if False in answers else None)
            case Operator.MATCHES:
                if not isinstance(value, str) or len(value) > MAX_TEXT:
                    return None
                return _compiled(str(operands[0])).fullmatch(value) is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        first = operands[0]
        assert isinstance(first, int | float)
        match operator:
            case Operator.LESS:
                return value < first
            case Operator.AT_MOST:
                return value <= first
            case Operator.MORE:
                return value > first
            case Operator.AT_LEAST:
                return value >= first
        second = operands[1]
        assert isinstance(second, int | float)
        if operator is Operator.BETWEEN:
            return first <= value <= second
        margin = abs(second) * first / 100
        return second - margin <= value <= second + margin

    @property
    def text(self) -> str:
        """The limit as it is written; :func:`parse` gives the same limit back."""
        shown = [_show(operand) for operand in self.operands]
        match self.operator:
            case Operator.KNOWN:
                return "known"
            case Operator.MATCHES:
                return f"matches {self.operands[0]}"
            case Operator.IN:
                return "in " + ", ".join(shown)
            case Operator.BETWEEN:
                return f"between {shown[0]} and {shown[1]}"
            case Operator.WITHIN:
                return f"within {shown[0]}% of {shown[1]}"
        return f"{self.operator.value} {shown[0]}"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Demand:
    """What one metric must show, and who says so."""

    fail: Limit | None
    """A value that misses it is a failure."""
    warn: Limit | None
    source: str
    """``default``, ``sku:NAME`` or ``inventory``."""
    reference: str = ""
    required: bool = True
    """Whether one made for a SKU demands the value of nodes that do not report it."""

    @property
    def explicit(self) -> bool:
        """Made for this SKU or this node: a value that is absent then is unknown, not ignored."""
        return self.required and self.source != "default"


@lru_cache(maxsize=4096)
def parse(text: str) -> Limit:
    """The limit that `text` says. Raises LimitError."""
    text = text.strip()
    if text == "known":
        return Limit(Operator.KNOWN)
    if found := re.match(r"(==|!=|<=|>=|<|>)\s*(.*)\Z", text, re.DOTALL):
        operator = Operator(found[1])
        word = found[2].strip()
        if not word:
            raise LimitError(f"'{text}' lacks a value after '{operator.value}'")
        if operator in (Operator.EQUAL, Operator.UNEQUAL):
            return Limit(operator, (_operand(word),))
        return Limit(operator, (_number(word, text),))
    keyword, _, rest = text.partition(" ")
    rest = rest.strip()
    match keyword:
        case "in" if rest:
            return Limit(Operator.IN, tuple(_operand(word) for word in _words(rest)))
        case "between" if found := re.fullmatch(r"(\S+)\s+and\s+(\S+)", rest):
            low, high = _number(found[1], text), _number(found[2], text)
            if low > high:
                raise LimitError(
                    f"'{text}': {found[1]} is larger than {found[2]}; the smaller number comes first"
                )
            return Limit(Operator.BETWEEN, (low, high))
        case "within" if found := re.fullmatch(r"(\S+?)\s*%\s+of\s+(\S+)", rest):
            percent, centre = _number(found[1], text), _number(found[2], text)
            if percent < 0 or centre == 0:
                raise LimitError(f"'{text}': needs a percentage of at least 0 and a number other than 0")
            return Limit(Operator.WITHIN, (percent, centre))
        case "matches" if rest:
            _refuse_costly(rest)
            return Limit(Operator.MATCHES, (rest,))
    raise LimitError(
        f"'{text}' is not a limit; write an operator and a value, such as '== 0', '!= x', '< 5', '>= 5', "
        "'in a, b', 'between 1 and 5', 'within 5% of 100', 'matches REGEX' or 'known'"
    )


def _nothing(value: Value) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _same(value: float | int | str | bool, operand: Operand) -> bool | None:
    """Equality within one kind. Text that happens to be written like the number is that number, and no other
    text is known to differ from it: ``[N/A]`` is neither 0 nor anything else."""
    if isinstance(operand, str):
        return value == operand if isinstance(value, str) else None
    if isinstance(value, bool) or isinstance(operand, bool):
        if isinstance(value, bool) and isinstance(operand, bool):
            return value is operand
        return None
    if isinstance(value, str):
        return True if value == _show(operand) else None
    return value == operand


def _operand(word: str) -> Operand:
    if len(word) >= 2 and word[0] == word[-1] == '"':
        inner = word[1:-1]
        if '"' in inner:
            raise LimitError(f"{word}: a double quote cannot stand inside quotes")
        return inner
    if '"' in word:
        raise LimitError(f"{word}: a double quote must open and close the whole word")
    if word in ("true", "false"):
        return word == "true"
    number = _as_number(word)
    return word if number is None else number


def _number(word: str, whole: str) -> float | int:
    number = _as_number(word)
    if number is None:
        raise LimitError(f"'{whole}': '{word}' is not a number")
    return number


_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


def _as_number(word: str) -> float | int | None:
    if len(word) > 40 or not _NUMBER.fullmatch(word):
        return None
    number = float(word)
    if not math.isfinite(number):
        return None
    return int(word) if re.fullmatch(r"[+-]?\d+", word, re.ASCII) else number


def _words(rest: str) -> list[str]:
    words = [word.strip() for word in re.findall(r'(?:"[^"]*"|[^,"])+|(?<=,)(?=,|\Z)|^(?=,)', rest)]
    if not words or "" in words or rest.count('"') % 2:
        raise LimitError(f"'in {rest}': expected values separated by commas")
    return words


def _show(operand: Operand) -> str:
    if isinstance(operand, bool):
        return str(operand).lower()
    if isinstance(operand, str):
        plain = (
            operand.strip() == operand
            and operand not in ("", "true", "false")
            and not any(c in operand for c in ',"')
            and _as_number(operand) is None
        )
        return operand if plain else f'"{operand}"'
    return repr(operand)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _refuse_costly(pattern: str) -> None:
    """Refuse what cannot be compiled, and what a hostile value could make run for ever."""
    if len(pattern) > MAX_PATTERN:
        raise LimitError(f"the pattern is longer than {MAX_PATTERN} characters")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise LimitError(f"'{pattern}' is not a regular expression: {error}") from None
    if _ways(pattern) > MAX_WAYS:
        raise LimitError(
            f"'{pattern}' could take for ever on an unlucky value (repeats in repeats, or many of them); "
            r"write a set, such as [\d.]+, or fewer repeats"
        )


_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d*)(?:(,)(\d*))?\}[?+]?")


@dataclass
class _Sequence:
    """Ways in which the part of the pattern between two parentheses can match, upper bounds."""

    earlier_branches: float = 0.0
    before: float = 1.0
    last: float = 1.0

    @property
    def total(self) -> float:
        return self.earlier_branches + self.before * self.last


def _ways(pattern: str) -> float:
    """An upper bound of the ways that a backtracking matcher may try on MAX_TEXT characters: repeats in a row
    multiply, alternatives add, and a repeated group counts once for each repetition."""
    open_groups = [_Sequence()]
    position = 0
    while position < len(pattern):
        current = open_groups[-1]
        if found := _QUANTIFIER.match(pattern, position):
            low, high = _bounds(found)
            try:
                current.last = current.last**high * (high - low + 1)
            except OverflowError:
                return math.inf
            position = found.end()
            continue
        step = 1
        match pattern[position]:
            case "(":
                open_groups.append(_Sequence())
                # The question mark of "(?:" is not a quantifier.
                position += 2 if pattern.startswith("(?", position) else 1
                continue
            case ")":
                inner = open_groups.pop().total
                current = open_groups[-1]
                current.before, current.last = current.before * current.last, inner
                position += 1
                continue
            case "|":
                current.earlier_branches, current.before, current.last = current.total, 1.0, 1.0
                position += 1
                continue
            case "\\":
                step = 2
            case "[":
                step = _end_of_set(pattern, position) - position
        current.before, current.last = current.before * current.last, 1.0
        position += step
    return open_groups[0].total


def _bounds(quantifier: re.Match[str]) -> tuple[int, int]:
    match quantifier[0][0]:
        case "?":
            return 0, 1
        case "*" | "+":
            return 0, MAX_TEXT
    low, comma, high = quantifier.groups()
    least = min(int(low or 0), MAX_TEXT)
    return least, (min(int(high or MAX_TEXT), MAX_TEXT) if comma else least)


def _end_of_set(pattern: str, start: int) -> int:
    position = start + 1
    if pattern.startswith("^", position):
        position += 1
    if pattern.startswith("]", position):
        position += 1
    while pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
