"""Reads ``lifecycle.yaml``. Apart from ``lifecycle`` because the reader's libraries cost time to import."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from inventory import document
from inventory.lifecycle import Lifecycle, Rule, State, StateFacts, Transition

Verdict = Literal["healthy", "degraded", "unhealthy", "unknown"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _WhenCleared(_Strict):
    cleared: State


class _State(_Strict):
    means: str
    jobs_take: bool
    load: Literal["allowed", "when_told"]
    original: tuple[str, ...]
    after_validation: dict[Verdict, State | Literal["stay"] | _WhenCleared]
    to: dict[State, str]


class _Table(_Strict):
    states: dict[State, _State]


def read_table(text: str | None = None) -> Lifecycle:
    """The lifecycle that ships with the program, or that of `text`; DocumentError if it is inconsistent."""
    if text is None:
        text = files("inventory").joinpath("lifecycle.yaml").read_text(encoding="utf-8")
    source = document.read("lifecycle.yaml", text)
    written = source.parse(_Table).states
    if missing := [state for state in State if state not in written]:
        raise source.error(("states",), f"these states are missing: {', '.join(missing)}")
    states: dict[State, StateFacts] = {}
    rules: dict[tuple[State, str], Rule] = {}
    for state, entry in written.items():
        place = ("states", str(state))
        if state in entry.to:
            raise source.error((*place, "to", str(state)), "a way must lead to another state")
        ways = {target: Transition(state, target, means) for target, means in entry.to.items()}
        states[state] = StateFacts(
            state, entry.means, entry.jobs_take, entry.load == "allowed", entry.original, ways
        )
        for verdict in get_args(Verdict):
            answer = entry.after_validation.get(verdict)
            if answer is None:
                raise source.error((*place, "after_validation"), f"the verdict '{verdict}' is missing")
            rule = _rule(answer)
            if rule.target is not None and rule.target not in ways:
                raise source.error(
                    (*place, "after_validation", verdict), f"there is no way from {state} to {rule.target}"
                )
            rules[state, verdict] = rule
    return Lifecycle(states, rules)


def _rule(answer: State | Literal["stay"] | _WhenCleared) -> Rule:
    match answer:
        case _WhenCleared(cleared=target):
            return Rule(target, needs_clearing=True)
        case State():
            return Rule(answer)
        case _:
            return Rule(None)
