"""Node-set expressions."""

from __future__ import annotations

import time

import pytest
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet
from hypothesis import given
from hypothesis import strategies as st

from inventory.errors import UsageError
from inventory.fleet import MAX_NODES
from inventory.nodeset import declared, expand, fold, natural, pattern


def test_ranges_expand_in_the_order_in_which_they_are_written() -> None:
    assert expand("node[001-003,007],gate") == ["node001", "node002", "node003", "node007", "gate"]
    assert expand("n[3,1-2]") == ["n3", "n1", "n2"]
    assert expand("r[1-2]n[08-10/2]") == ["r1n08", "r1n10", "r2n08", "r2n10"]


def test_operators_are_read_from_left_to_right() -> None:
    assert expand("n[1-4]!n[2-3]") == ["n1", "n4"]
    assert expand("n[1-4]&n[3-6]") == ["n3", "n4"]
    assert expand("n[1-3]^n[3-4]") == ["n1", "n2", "n4"]
    assert expand("n[1-2]!n2,n2") == ["n1", "n2"]
    assert expand(" n1 , n2 n3 ") == ["n1", "n2", "n3"]


def test_folding_is_the_opposite_of_expanding() -> None:
    assert fold(["node001", "node002", "node004"]) == "node[001-002,004]"
    assert fold(["gate"]) == "gate"
    assert fold([]) == ""
    assert fold(f"10.0.0.{i}" for i in range(1, 65)) == "10.0.0.[1-64]"


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "an empty node expression"),
        ("  ", "an empty node expression"),
        ("n[1-3", "brackets of 'n[1-3' do not match"),
        ("n1-3]", "brackets of 'n1-3]' do not match"),
        ("n[[1]]", "do not match"),
        ("n[]", "a range is empty"),
        ("n[1,]", "a range is empty"),
        ("n[a-c]", "'a-c' is not a range"),
        ("n[5-1]", "'5-1' runs backwards; write [1-5]"),
        ("n[1-3/0]", "step of '1-3/0' must be at least 1"),
        ("n[01-100]", "different widths; write [001-100]"),
        ("a,,b", "nothing stands before ',' at position 3"),
        ("!a", "nothing stands before '!' at position 1"),
        ("a,", "nothing follows the last ','"),
    ],
)
def test_a_malformed_expression_says_what_is_wrong(expression: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(expression)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "n[1-5000000]",
        "n[1-999999999999999999]",
        "n[1-3000]x[1-3000]",
        "n[1-60000],m[1-60000]",
        "n" + "[1-2]" * 60,
        "n[1-50000]" + "!n[1-50000]" * 100,
    ],
)
def test_a_huge_expression_is_refused_before_anything_is_built(expression: str) -> None:
    started = time.process_time()
    with pytest.raises(UsageError, match=f"at most {MAX_NODES:,}"):
        expand(expression)
    with pytest.raises(UsageError):
        declared(expression).names()
    assert time.process_time() - started < 0.2


def test_the_largest_allowed_range_is_expanded() -> None:
    assert len(expand(f"n[1-{MAX_NODES}]")) == MAX_NODES


def test_patterns_keep_repetitions_and_leave_ipv6_brackets_alone() -> None:
    assert pattern("10.0.0.[1-2,2]").names() == ["10.0.0.1", "10.0.0.2", "10.0.0.2"]
    assert pattern("https://[fe80::1]/").names() == ["https://[fe80::1]/"]
    assert pattern("[2201-2203]").names() == ["2201", "2202", "2203"]


def test_names_sort_as_people_count() -> None:
    assert sorted(["n10", "n2", "n1", "m3"], key=natural) == ["m3", "n1", "n2", "n10"]
    assert sorted(["r2n1", "r1n10", "r1n9"], key=natural) == ["r1n9", "r1n10", "r2n1"]


NUMBER = st.integers(0, 30)
SPAN = st.tuples(NUMBER, NUMBER).map(sorted).map(lambda ends: f"{ends[0]}-{ends[1]}") | NUMBER.map(str)
PADDED = st.tuples(NUMBER, NUMBER).map(sorted).map(lambda ends: f"{ends[0]:03d}-{ends[1]:03d}")
BRACKETS = st.lists(SPAN | PADDED, min_size=1, max_size=3).map(lambda spans: f"[{','.join(spans)}]")
TERM = st.tuples(st.sampled_from("abc"), BRACKETS | st.just(""), st.sampled_from(["", "-x"])).map("".join)
EXPRESSION = st.tuples(TERM, st.lists(st.tuples(st.sampled_from(",!&^"), TERM), max_size=4)).map(
    lambda parts: parts[0] + "".join(op + term for op, term in parts[1])
)


@given(EXPRESSION)
def test_every_expression_means_what_it_means_to_clustershell(expression: str) -> None:
    theirs = list(NodeSet(expression, resolver=RESOLVER_NOGROUP))
    assert sorted(expand(expression)) == sorted(theirs)


@given(st.sets(TERM.filter(lambda term: "[" not in term) | NUMBER.map(lambda n: f"n{n}"), min_size=1))
def test_expanding_what_was_folded_gives_the_same_names(names: set[str]) -> None:
    assert set(expand(fold(sorted(names)))) == names


@given(st.text(alphabet="ab01[]-/,!&^@ *", max_size=12))
def test_any_text_is_expanded_or_refused_with_one_line(text: str) -> None:
    message = ""
    try:
        expand(text)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
