"""Finding the guilty one among many by pairs, against made-up clusters in which the guilty one is known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.pairwise import Diagnosis, PairResult, Round, all_pairs, diagnose, recheck, screen, suspect_links

NODES = [f"n{i:02}" for i in range(32)]
TREE = {node: ("core", f"pod{i // 16}", f"leaf{i // 8}") for i, node in enumerate(NODES)}


def measured(rounds: list[Round], bad_nodes: set[str], bad_paths: set[frozenset[str]]) -> list[PairResult]:
    """What a cluster with these faults would answer."""
    return [
        PairResult(pair, not (set(pair) & bad_nodes) and frozenset(pair) not in bad_paths)
        for one in rounds
        for pair in one
    ]


@given(st.integers(0, 33))
def test_the_circle_covers_every_pair_once_and_keeps_every_node_busy(count: int) -> None:
    nodes = [str(i) for i in range(count)]
    rounds = all_pairs(nodes)
    pairs = [frozenset(pair) for one in rounds for pair in one]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)
    for one in rounds:
        assert len({node for pair in one for node in pair}) == 2 * len(one) == count - count % 2


def test_a_screen_has_one_round_for_each_distance_and_every_node_in_each() -> None:
    rounds = screen(NODES, TREE)
    assert len(rounds) == 3
    shared = [{_common(a, b) for a, b in one} for one in rounds]
    assert shared == [{3}, {2}, {1}]
    assert all(len({n for pair in one for n in pair}) == len(NODES) for one in rounds)


def _common(a: str, b: str) -> int:
    return next((i for i in range(3) if TREE[a][i] != TREE[b][i]), 3)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3).map(tuple), min_size=1, max_size=20))
def test_no_node_is_in_two_pairs_of_a_round_whatever_the_places(places: list[tuple[str, ...]]) -> None:
    nodes = [str(i) for i in range(len(places))]
    for one in screen(nodes, dict(zip(nodes, places, strict=True))):
        used = [node for pair in one for node in pair]
        assert len(used) == len(set(used))


@pytest.mark.parametrize("guilty", [set(), {"n03"}, {"n03", "n17"}, {"n00", "n01", "n31"}])
def test_screen_and_recheck_name_exactly_the_bad_nodes(guilty: set[str]) -> None:
    results = measured(screen(NODES, TREE), guilty, set())
    results += measured(recheck(results), guilty, set())
    assert diagnose(results) == Diagnosis(tuple(sorted(guilty)), (), ())


def test_a_bad_path_between_good_nodes_accuses_neither() -> None:
    rounds = screen(NODES, TREE)
    bad = frozenset(rounds[1][0])
    results = measured(rounds, set(), {bad})
    found = diagnose(results)
    assert found.nodes == ()
    assert found.paths == (tuple(sorted(bad)),)


def test_one_failure_is_not_enough_to_accuse_a_node() -> None:
    found = diagnose([PairResult(("a", "b"), False), PairResult(("b", "c"), True)])
    assert found == Diagnosis((), (), (("a", "b"),))


def test_a_pair_that_fails_and_passes_is_unresolved() -> None:
    found = diagnose([PairResult(("a", "b"), False), PairResult(("b", "a"), True)])
    assert found.unresolved == (("a", "b"),)
    assert found.nodes == found.paths == ()


def test_a_recheck_gives_suspects_other_partners_that_are_good() -> None:
    results = measured(screen(NODES, TREE), {"n03"}, set())
    met = {n for r in results for n in r.pair if "n03" in r.pair}
    for one in recheck(results):
        for suspect, partner in one:
            assert suspect == "n03"
            assert partner not in met


@given(st.integers(0, 10_000))
def test_the_verdict_does_not_depend_on_the_order_of_results(seed: int) -> None:
    results = measured(screen(NODES, TREE), {"n05", "n20"}, {frozenset(("n00", "n08"))})
    other = list(results)
    random.Random(seed).shuffle(other)
    assert diagnose(other) == diagnose(results)


def test_the_link_that_all_failed_paths_share_is_named() -> None:
    failed = [{"a-s1", "s1-s2", "s2-c"}, {"b-s1", "s1-s2", "s2-d"}]
    passed = [{"a-s1", "b-s1"}, {"s2-c", "s2-d"}]
    assert suspect_links(failed, passed) == ("s1-s2",)


def test_links_that_cannot_be_told_apart_are_all_named_and_two_faults_are_two_links() -> None:
    assert suspect_links([{"x", "y"}], []) == ("x", "y")
    assert suspect_links([{"x", "p"}, {"x", "q"}, {"z", "r"}], [{"p", "q", "r"}]) == ("x", "z")
    assert suspect_links([{"x"}], [{"x"}]) == ()
