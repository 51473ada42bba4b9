"""English-like text from a probabilistic grammar, to train a tiny model on where no corpus is at hand.

Origin: every word list, sentence form and number below was written for this project and is under its licence;
nothing is taken from any other text. What it makes is a function of the seed alone.

A document is a short record of work on a ship, a farm or in a workshop. What there is to learn, from near to
far: spelling; word order and agreement in number; which verbs go with which things; that a place names its
own people and things; that a name, once given, is referred to by the right pronoun; and sums that come out
right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Place:
    """A scene: who works there, on what, and what they do to it. Things are (singular, plural)."""

    name: str
    people: tuple[str, ...]
    things: tuple[tuple[str, str], ...]
    deeds: tuple[tuple[str, str], ...]
    weather: tuple[str, ...]


PLACES = (
    Place(
        "harbour",
        ("sailor", "pilot", "captain", "carpenter"),
        (("rope", "ropes"), ("sail", "sails"), ("anchor", "anchors"), ("barrel", "barrels"), ("net", "nets")),
        (
            ("mends", "mended"),
            ("lifts", "lifted"),
            ("ties", "tied"),
            ("counts", "counted"),
            ("dries", "dried"),
        ),
        ("the tide was low", "fog lay on the water", "the wind came from the west", "the sea was calm"),
    ),
    Place(
        "farm",
        ("farmer", "shepherd", "miller", "gardener"),
        (
            ("sheep", "sheep"),
            ("basket", "baskets"),
            ("fence", "fences"),
            ("apple tree", "apple trees"),
            ("sack", "sacks"),
        ),
        (
            ("counts", "counted"),
            ("waters", "watered"),
            ("mends", "mended"),
            ("fills", "filled"),
            ("moves", "moved"),
        ),
        ("rain had fallen all night", "the ground was dry", "frost covered the field", "the sun stood high"),
    ),
    Place(
        "workshop",
        ("smith", "joiner", "clockmaker", "apprentice"),
        (
            ("wheel", "wheels"),
            ("hammer", "hammers"),
            ("spring", "springs"),
            ("chair", "chairs"),
            ("lamp", "lamps"),
        ),
        (
            ("repairs", "repaired"),
            ("paints", "painted"),
            ("tests", "tested"),
            ("sorts", "sorted"),
            ("cleans", "cleaned"),
        ),
        ("the fire burned low", "dust hung in the light", "the door stood open", "the shop was quiet"),
    ),
)
NAMES = (
    ("Anna", "she", "her"), ("Berta", "she", "her"), ("Clara", "she", "her"), ("Dora", "she", "her"),
    ("Edgar", "he", "his"), ("Franz", "he", "his"), ("Georg", "he", "his"), ("Hugo", "he", "his"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
QUALITIES = ("old", "heavy", "new", "small", "broken", "painted", "wooden", "grey")
NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """Documents of 300 to 1,200 characters, without end."""
    # The generator's words follow from random() alone, whose sequence Python promises to keep for a seed.
    chance = random.Random(seed)  # noqa: S311 - text, not secrets
    while True:
        yield _document(chance)


def text(seed: int, size: int) -> Iterator[str]:
    """The documents that make at least ``size`` bytes in all."""
    made = 0
    for document in documents(seed):
        if made >= size:
            return
        made += len(document.encode())
        yield document


def _document(chance: random.Random) -> str:
    place = _pick(chance, PLACES)
    hero, friend = _two(chance, NAMES)
    roles = _two(chance, place.people)
    day = int(chance.random() * len(DAYS))
    lines = [
        f"{DAYS[day]} at the {place.name}.",
        f"In the morning {_pick(chance, place.weather)}.",
        f"{hero[0]} is {_a(roles[0])} and {friend[0]} is {_a(roles[1])}.",
    ]
    forms = (_work, _sum, _help, _question)
    for _ in range(4 + int(chance.random() * 12)):
        lines.append(_pick(chance, forms)(chance, place, hero, friend))
    lines.append(f"In the evening {hero[0]} went home. Tomorrow is {DAYS[(day + 1) % len(DAYS)]}.")
    return " ".join(lines) + "\n"


Person = tuple[str, str, str]


def _work(chance: random.Random, place: Place, hero: Person, friend: Person) -> str:
    """What someone did, and how the thing is afterwards: the pronoun follows the name."""
    name, pronoun, possessive = _pick(chance, (hero, friend))
    thing, (_, did) = _pick(chance, place.things)[0], _pick(chance, place.deeds)
    kind = _pick(chance, QUALITIES)
    then = _pick(chance, place.deeds)[1]
    return f"{name} {did} the {kind} {thing}, and then {pronoun} {then} {possessive} own {thing}."


def _sum(chance: random.Random, place: Place, hero: Person, friend: Person) -> str:
    """Two numbers and what they make together: the noun follows the number."""
    first, second = 1 + int(chance.random() * 9), 1 + int(chance.random() * 9)
    thing = _pick(chance, place.things)
    return (
        f"{hero[0]} had {_many(first, thing)} and {friend[0]} had {_many(second, thing)}: "
        f"together they had {_many(first + second, thing)}."
    )


def _help(chance: random.Random, place: Place, hero: Person, friend: Person) -> str:
    """A habit, in the present: the verb follows the subject."""
    (does, _), things = _pick(chance, place.deeds), _pick(chance, place.things)[1]
    day = _pick(chance, DAYS)
    return f"Every {day} {friend[0]} {does} the {things}, because {hero[0]} asked {_object(friend)} to."


def _question(chance: random.Random, place: Place, hero: Person, friend: Person) -> str:
    """A question whose answer repeats it."""
    thing = _pick(chance, place.things)[0]
    kind, did = _pick(chance, QUALITIES), _pick(chance, place.deeds)[1]
    return f'"Who {did} the {kind} {thing}?" asked {friend[0]}. "I {did} the {kind} {thing}," said {hero[0]}.'


def _many(number: int, thing: tuple[str, str]) -> str:
    return f"{NUMBERS[number]} {thing[number != 1]}"


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _object(person: Person) -> str:
    return "her" if person[1] == "she" else "him"


def _two(chance: random.Random, choices: Sequence[Choice]) -> tuple[Choice, Choice]:
    """Two different ones."""
    first = int(chance.random() * len(choices))
    second = int(chance.random() * (len(choices) - 1))
    return choices[first], choices[second + (second >= first)]


def _pick(chance: random.Random, choices: Sequence[Choice]) -> Choice:
    """One of the choices; each is a little rarer than the one before it."""
    weights = [1 / (2 + place) for place in range(len(choices))]
    at = chance.random() * sum(weights)
    for choice, weight in zip(choices, weights, strict=True):
        at -= weight
        if at < 0:
            return choice
    return choices[-1]
