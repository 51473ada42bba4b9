"""Comparison with peers and with history: the odd one is found, and bad ones never make a good one odd."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.baseline import Baseline, Unlearned, learn, similarity
from probes.catalogue import BaselineSpec, PeerSpec
from probes.peers import Sample, compare

MAJORITY = PeerSpec(rule="majority")
SLOWER = PeerSpec(rule="robust_z", worse="lower")
BOTH = PeerSpec(rule="robust_z")


def nodes(*values: object, device: str | None = None) -> list[Sample]:
    return [(f"n{i}", device, value) for i, value in enumerate(values)]  # type: ignore[misc]


def accused(samples: list[Sample], spec: PeerSpec) -> list[tuple[str, str | None]]:
    return [(o.node, o.device) for o in compare(samples, spec).outliers]


def test_the_node_with_another_version_is_named() -> None:
    result = compare(nodes("535.1", "535.1", "550.2", "535.1"), MAJORITY)
    (outlier,) = result.outliers
    assert (outlier.node, outlier.value, outlier.limit) == ("n2", "550.2", "== 535.1")
    assert outlier.reference == "3 of 4 nodes"


def test_without_a_majority_nobody_is_accused_and_it_says_so() -> None:
    result = compare(nodes("a", "a", "b", "b"), MAJORITY)
    assert result.outliers == ()
    assert "no value has a majority among 4 nodes (2 say a, 2 say b)" in result.undecided


def test_two_nodes_cannot_outvote_each_other() -> None:
    result = compare(nodes("a", "b"), MAJORITY)
    assert result.outliers == ()
    assert not result.compared


def test_the_device_with_another_version_on_its_node_is_named_though_the_node_is_alone() -> None:
    samples: list[Sample] = [("n1", str(d), "v2" if d == 5 else "v1") for d in range(8)]
    assert accused(samples, MAJORITY) == [("n1", "5")]


def test_a_device_is_compared_with_the_device_of_its_name() -> None:
    samples: list[Sample] = [(f"n{i}", d, d) for i in range(4) for d in ("eth0", "ib0", "ib1", "ib2")]
    assert accused(samples, MAJORITY) == []


def test_devices_named_by_serial_number_are_compared_all_together() -> None:
    samples: list[Sample] = [(f"n{i}", f"serial{i}{d}", "v1") for i in range(4) for d in range(2)]
    samples[3] = (samples[3][0], samples[3][1], "v0")
    assert accused(samples, MAJORITY) == [("n1", "serial11")]


def test_a_node_has_one_voice_however_many_devices_it_has() -> None:
    samples: list[Sample] = [("big", f"b{d}", "odd") for d in range(50)]
    samples += [(f"n{i}", f"s{i}", "usual") for i in range(3)]
    assert {node for node, _ in accused(samples, MAJORITY)} == {"big"}


def test_values_that_are_not_known_have_no_voice() -> None:
    assert accused(nodes(None, None, None, "a", "a", "b"), MAJORITY) == [("n5", None)]


def test_true_is_not_one() -> None:
    assert accused(nodes(1, 1.0, 1, True), MAJORITY) == [("n3", None)]


def test_a_slow_node_is_named_with_its_peers_numbers() -> None:
    (outlier,) = compare(nodes(612, 610, 500, 611, 613, 609), SLOWER).outliers
    assert outlier.node == "n2"
    assert outlier.limit.startswith(">= ")
    assert outlier.reference.startswith("median 610.5 of 6 nodes")


def test_a_node_that_is_better_than_its_peers_is_not_accused() -> None:
    assert accused(nodes(100, 101, 99, 100, 150), SLOWER) == []
    assert accused(nodes(100, 101, 99, 100, 150), BOTH) == [("n4", None)]


def test_a_difference_below_the_floor_does_not_count_however_tight_the_peers_are() -> None:
    assert accused(nodes(100, 100, 100, 100, 96), SLOWER) == []
    assert accused(nodes(100, 100, 100, 100, 94), SLOWER) == [("n4", None)]


def test_a_device_far_slower_than_its_seven_siblings_is_found_on_a_single_node() -> None:
    samples: list[Sample] = [("n1", str(d), 400.0 if d == 3 else 600.0 + d) for d in range(8)]
    assert accused(samples, SLOWER) == [("n1", "3")]


def test_devices_that_are_not_alike_are_not_compared_with_their_siblings() -> None:
    ports: list[Sample] = [("n1", f"ib{d}", 400.0) for d in range(8)] + [("n1", "eth0", 25.0)]
    assert accused(ports, SLOWER) == [("n1", "eth0")]
    assert accused(ports, PeerSpec(rule="robust_z", siblings=False)) == []


def test_too_few_numbers_are_not_compared() -> None:
    result = compare(nodes(600, 600, 100), SLOWER)
    assert result.outliers == ()
    assert not result.compared


GOOD = st.floats(98.0, 102.0)
BAD = st.floats(-1e6, 1e6)


@given(st.lists(GOOD, min_size=4, max_size=40), st.data())
def test_a_bad_minority_never_makes_a_good_number_an_outlier(good: list[float], data: st.DataObject) -> None:
    bad = data.draw(st.lists(BAD, max_size=len(good) - 1))
    samples = [(f"good{i}", None, x) for i, x in enumerate(good)] + [
        (f"bad{i}", None, x) for i, x in enumerate(bad)
    ]
    assert not [node for node, _ in accused(samples, BOTH) if node.startswith("good")]


@given(st.integers(2, 30), st.data())
def test_a_bad_minority_never_makes_a_good_version_an_outlier(good: int, data: st.DataObject) -> None:
    bad = data.draw(st.lists(st.sampled_from(["x", "y", "z", 1, None]), max_size=good - 1))
    samples: list[Sample] = [(f"good{i}", None, "v") for i in range(good)]
    samples += [(f"bad{i}", None, value) for i, value in enumerate(bad)]
    found = accused(samples, MAJORITY)
    assert not [node for node, _ in found if node.startswith("good")]
    if len(samples) >= 3 and all(value is not None for value in bad):
        assert len(found) == len(bad)


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from([f"n{i}" for i in range(6)]), st.sampled_from([None, "0", "1"]), st.floats(-1e3, 1e3)
    ),
    max_size=30,
    unique_by=lambda s: s[:2],
)


@given(SAMPLES, st.randoms(use_true_random=False), st.sampled_from([MAJORITY, SLOWER, BOTH]))
def test_the_order_in_which_nodes_answer_changes_nothing(
    samples: list[Sample], rng: random.Random, spec: PeerSpec
) -> None:
    other = list(samples)
    rng.shuffle(other)
    assert sorted(accused(samples, spec), key=str) == sorted(accused(other, spec), key=str)
    assert compare(samples, spec).compared == compare(other, spec).compared


LOWER = BaselineSpec(worse="lower")
HIGHER = BaselineSpec(worse="higher")


def history(
    count: int, centre: float, scatter: float, seed: int = 1, prefix: str = "n"
) -> dict[str, list[float]]:
    rng = random.Random(seed)
    return {f"{prefix}{i}": [rng.gauss(centre, scatter) for _ in range(10)] for i in range(count)}


def learned(samples: dict[str, list[float]], spec: BaselineSpec = LOWER) -> Baseline:
    baseline = learn(samples, spec)
    assert isinstance(baseline, Baseline), baseline
    return baseline


def test_a_sample_that_is_five_percent_worse_throughout_has_similarity_095() -> None:
    assert similarity([95.0] * 3, [100.0] * 5) == pytest.approx(0.95)
    assert similarity([95.0], [100.0], "lower") == pytest.approx(0.95)
    assert similarity([105.0], [100.0], "lower") == 1.0
    assert similarity([105.0], [100.0], "higher") == pytest.approx(0.95)


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=20))
def test_a_sample_is_entirely_like_itself(sample: list[float]) -> None:
    assert similarity(sorted(sample), sorted(sample)) == 1.0


def test_a_value_below_95_percent_of_a_steady_history_is_not_accepted_and_a_better_one_is() -> None:
    baseline = learned(history(20, 600, 1.0))
    assert baseline.accepts(580)
    assert not baseline.accepts(560)
    assert baseline.accepts(700)
    assert 566 < baseline.bound < 574
    assert "similarity 0.93" in baseline.describe(560)


def test_the_worse_side_is_the_higher_one_for_latencies() -> None:
    baseline = learned(history(20, 10, 0.05), HIGHER)
    assert baseline.accepts(8)
    assert not baseline.accepts(11)
    assert baseline.limit.startswith("<= 10.")


def test_what_the_fleet_itself_scatters_is_not_odd() -> None:
    baseline = learned(history(50, 100, 10))
    assert baseline.accepts(85)
    assert not baseline.accepts(40)


def test_few_nodes_and_a_fleet_that_does_not_agree_give_no_baseline() -> None:
    assert learn(history(4, 100, 1), LOWER) == Unlearned("only 4 nodes have a history; 5 are needed")
    split = history(10, 100, 1) | history(10, 50, 1, prefix="m")
    assert isinstance(learn(split, LOWER), Unlearned)
    assert isinstance(learn(split | history(10, 10, 1, prefix="o"), LOWER), Unlearned)


@settings(max_examples=40)
@given(st.integers(8, 40), st.floats(0.0, 0.3), st.floats(0.1, 3.0), st.integers(0, 1000))
def test_a_bad_minority_does_not_drag_a_baseline_along(
    good: int, share: float, factor: float, seed: int
) -> None:
    bad = int(good * share / (1 - share))
    clean = learned(history(good, 600, 2, seed))
    spoilt = learn(history(good, 600, 2, seed) | history(bad, 600 * factor, 2, seed + 1, "bad"), LOWER)
    assert isinstance(spoilt, Baseline)
    assert spoilt.centre == pytest.approx(clean.centre, rel=0.01)
    if abs(factor - 1) > 0.1:
        assert {name for name in spoilt.trimmed if name.startswith("bad")} == {f"bad{i}" for i in range(bad)}
        assert spoilt.bound == pytest.approx(clean.bound, rel=0.01)


@given(st.permutations(list(history(12, 100, 3).items())))
def test_the_order_of_history_changes_nothing(items: list[tuple[str, list[float]]]) -> None:
    assert learn(dict(items), LOWER) == learn(history(12, 100, 3), LOWER)


def test_a_difference_below_the_least_that_counts_accuses_nobody() -> None:
    usual = [(f"n{i}", None, 0.10 + i / 1000) for i in range(8)]
    spec = PeerSpec(rule="robust_z", worse="higher", floor=1.0, least=5.0)
    assert compare([*usual, ("slow", None, 0.7)], spec).outliers == ()
    assert [o.node for o in compare([*usual, ("slow", None, 7.0)], spec).outliers] == ["slow"]
