"""What is wrong with a configuration, one line a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """`where`: ``FILE:LINE``, ``FILE`` or ``--set KEY=VALUE``; empty where the field says it all."""

    where: str
    field: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.field) if part)
        return f"{place}: found {self.found}, expected {self.expected}; {self.fix}"


class ConfigError(ValueError):
    """A person's mistakes: one clear line each, no traceback, exit status 2."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = tuple(mistakes)


def kind(value: object) -> str:
    """What YAML calls this value."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping of keys to values"
        case list() | tuple():
            return "a list"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r}"
        case _:
            return repr(value)
