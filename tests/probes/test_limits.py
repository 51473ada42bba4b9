"""The grammar of limits: what it accepts, what it means, and that nothing unknown ever holds."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.limits import Limit, LimitError, Operator, parse

NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False, width=64, max_value=1e15)
)
WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters='"', exclude_categories=("Cs", "Cc", "Zl", "Zp"))
)
OPERANDS = st.one_of(NUMBERS, WORDS, st.booleans())
LIMITS = st.one_of(
    st.builds(lambda o, v: Limit(o, (v,)), st.sampled_from([Operator.EQUAL, Operator.UNEQUAL]), OPERANDS),
    st.builds(
        lambda o, v: Limit(o, (v,)),
        st.sampled_from([Operator.LESS, Operator.AT_MOST, Operator.MORE, Operator.AT_LEAST]),
        NUMBERS,
    ),
    st.builds(lambda vs: Limit(Operator.IN, tuple(vs)), st.lists(OPERANDS, min_size=1, max_size=5)),
    st.builds(lambda a, b: Limit(Operator.BETWEEN, (min(a, b), max(a, b))), NUMBERS, NUMBERS),
    st.builds(
        lambda p, c: Limit(Operator.WITHIN, (p, c)), NUMBERS.filter(lambda n: n >= 0), NUMBERS.filter(bool)
    ),
    st.just(Limit(Operator.KNOWN)),
    st.sampled_from([Limit(Operator.MATCHES, (p,)) for p in (r"535\..*", "a|b", r"[\d.]+", '"quoted"')]),
)


@given(LIMITS)
def test_every_limit_is_read_back_from_its_own_text(limit: Limit) -> None:
    assert parse(limit.text) == limit


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("== 0", [0, 0.0, "0"], [1, -1, 0.5]),
        ("== true", [True], [False]),
        ("== performance", ["performance"], ["powersave", ""]),
        ('== "550"', ["550"], ["551"]),
        ("!= 0", [1, 2.5], [0, "0"]),
        ("!= off", ["on"], ["off"]),
        ("< 5", [4.99, -100], [5, 6]),
        ("<=5", [5], [5.01]),
        ("> 5", [5.01], [5]),
        (">= 5", [5], [4]),
        ("in 16, 32", [16, 32.0], [8]),
        ('in "a, b", c', ["a, b", "c"], ["a", "b"]),
        ("between 1 and 5", [1, 5, 3.3], [0.99, 5.01]),
        ("within 5% of 100", [95, 105, 100], [94.9, 105.1]),
        ("within 5% of -100", [-95, -105], [-94, 100]),
        (r"matches 535\.\d+(\.\d+)?", ["535.104", "535.104.05"], ["550.1", "535.104.05 beta", " 535.104"]),
        ("known", [0, "", False, "x"], [None, math.nan]),
    ],
)
def test_a_limit_holds_for_the_healthy_and_not_for_the_others(text: str, good: list, bad: list) -> None:
    limit = parse(text)
    assert [limit.holds(value) for value in good] == [True] * len(good)
    assert [limit.holds(value) for value in bad] == [False] * len(bad)


@given(LIMITS.filter(lambda limit: limit.operator is not Operator.KNOWN))
def test_nothing_holds_for_a_value_that_is_not_there(limit: Limit) -> None:
    assert limit.holds(None) is None
    assert limit.holds(math.nan) is None
    assert limit.holds(math.inf) is None


@pytest.mark.parametrize(
    "text", ["== 0", "!= 0", "< 5", ">= 5", "in 1, 2", "between 1 and 5", "within 5% of 10"]
)
@pytest.mark.parametrize("value", ["[N/A]", "", "ERR!", "five", True, False])
def test_text_against_a_numeric_limit_cannot_be_told(text: str, value: str | bool) -> None:
    assert parse(text).holds(value) is None


@pytest.mark.parametrize("value", [3, 2.5, True])
def test_a_number_against_a_text_limit_cannot_be_told(value: float | bool) -> None:
    assert parse("== performance").holds(value) is None
    assert parse("!= performance").holds(value) is None
    assert parse("matches .*").holds(value) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a limit"),
        ("5", "is not a limit"),
        ("== ", "lacks a value"),
        ("< five", "'five' is not a number"),
        ("> nan", "'nan' is not a number"),
        ("< 1e999", "is not a number"),
        ("between 5 and 1", "the smaller number comes first"),
        ("between 1, 5", "is not a limit"),
        ("within 5% of 0", "a number other than 0"),
        ("within -5% of 3", "at least 0"),
        ("in ", "is not a limit"),
        ("in a,,b", "separated by commas"),
        ('in "a', "separated by commas"),
        ('== a"b', "double quote"),
        ("matches (", "not a regular expression"),
        ("matches (a+)+", "for ever"),
        ("matches (a|aa)*b", "for ever"),
        ("matches (a{0,9}){0,9}", "for ever"),
        ("matches " + "a" * 300, "longer than"),
        ("__import__('os')", "is not a limit"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(LimitError, match=says):
        parse(text)


@pytest.mark.parametrize("pattern", [r"\w+\w+\w+\w+!", r".*a.*b.*c.*d", r"[\d.]+", r"(x\d+){1,2}y"])
@pytest.mark.parametrize("value", ["a" * 128, "ab" * 64, "x1" * 64])
def test_an_accepted_pattern_answers_soon_on_any_value(pattern: str, value: str) -> None:
    limit = parse(f"matches {pattern}")
    start = time.process_time()
    limit.holds(value)
    assert time.process_time() - start < 2.0


def test_a_value_too_long_for_a_pattern_cannot_be_told() -> None:
    assert parse("matches a*").holds("a" * 129) is None
