"""What one node cannot tell, over whole made-up fleets."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.catalogue import load_catalogue
from probes.criteria import Rule
from probes.fleetwide import (
    Member,
    compare_baselines,
    compare_kinds,
    compare_peers,
    compared_metrics,
    learn_baselines,
)
from probes.model import Outcome
from probes.profiles import Profiles, RuleBook
from tests.probes.catalogues import catalogue

DIGEST, STACK = "compute.golden.digest", "compute.golden.stack"
DRIVER, RATE = "accelerator.versions.driver", "accelerator.gemm.bf16"


@pytest.fixture
def rules(tmp_path: Path) -> dict[str, Rule]:
    return RuleBook(catalogue(tmp_path), Profiles({})).by_metric()


def member(name: str, driver: str = "535", rate: float = 600.0, sku: str | None = "h100") -> Member:
    return Member(name, sku, {DRIVER: [(None, driver)], RATE: [(str(d), rate + d / 10) for d in range(8)]})


def test_skew_and_slowness_are_found_with_the_outcome_that_the_check_wants(rules: dict[str, Rule]) -> None:
    fleet = [member(f"n{i}") for i in range(20)]
    fleet[3], fleet[7] = member("n3", driver="550"), member("n7", rate=500)
    result = compare_peers(fleet, rules)
    assert set(result.findings) == {"n3", "n7"}
    (skew,) = result.findings["n3"]
    assert (skew.outcome, skew.value, skew.limit, skew.source) == (Outcome.FAIL, "550", "== 535", "peers")
    assert {(f.outcome, f.metric, f.device) for f in result.findings["n7"]} == {
        (Outcome.WARN, "bf16", str(d)) for d in range(8)
    }
    assert result.notes == ()


def test_only_nodes_of_the_same_sku_are_peers(rules: dict[str, Rule]) -> None:
    fleet = [member(f"a{i}", driver="535", rate=600) for i in range(9)]
    fleet += [member(f"b{i}", driver="6.2", rate=1200, sku="mi300x") for i in range(5)]
    assert compare_peers(fleet, rules).findings == {}


def test_a_fleet_without_a_majority_accuses_nobody_and_says_so_once(rules: dict[str, Rule]) -> None:
    fleet = [member(f"n{i}", driver="535" if i % 2 else "550") for i in range(8)]
    result = compare_peers(fleet, rules)
    assert result.findings == {}
    assert [(n.metric, n.sku) for n in result.notes] == [(DRIVER, "h100")]
    assert "nobody is accused" in result.notes[0].message


def test_too_few_peers_are_told_once_for_a_sku(rules: dict[str, Rule]) -> None:
    (note,) = compare_peers([Member("n1", None, {DRIVER: [(None, "535")]})], rules).notes
    assert note.message == "1 metrics have too few peers among 1 node of an unnamed SKU"


def test_a_node_that_lost_its_accelerators_is_unlike_the_others_though_nobody_said_what_it_is() -> None:
    fleet = [Member(f"n{i}", "h100", {}, declared=False) for i in range(5)]
    fleet.append(Member("n5", None, {}, declared=False))
    result = compare_kinds(fleet)
    assert set(result.findings) == {"n5"}
    assert "shows no accelerators, most nodes are h100" in result.findings["n5"][0].message


def test_a_node_whose_sku_is_declared_may_differ_and_two_halves_accuse_nobody() -> None:
    assert (
        compare_kinds([Member(f"n{i}", f"sku{i % 2}", {}, declared=False) for i in range(6)]).findings == {}
    )
    mixed = [Member(f"n{i}", "h100", {}, declared=False) for i in range(5)] + [Member("cpu", "cpu", {})]
    assert compare_kinds(mixed).findings == {}


def test_a_uniformly_slow_run_is_unlike_the_history_of_its_sku(rules: dict[str, Rule]) -> None:
    history = {("h100", RATE): {f"n{i}": [600.0 + i / 10] * 5 for i in range(10)}}
    baselines, notes = learn_baselines(history, rules)
    assert notes == ()
    slow = [member(f"n{i}", rate=500) for i in range(10)]
    assert compare_peers(slow, rules).findings == {}
    result = compare_baselines(slow, baselines, rules)
    assert set(result.findings) == {f"n{i}" for i in range(10)}
    finding = result.findings["n0"][0]
    assert (finding.source, finding.device, finding.limit[:5]) == ("baseline", "0", ">= 57")
    assert "similarity 0.8" in finding.reference
    assert compare_baselines([member("n1", rate=590)], baselines, rules).findings == {}
    assert compare_baselines([member("n1", rate=1, sku="other")], baselines, rules).findings == {}


def test_what_cannot_be_learned_is_told_and_compares_nothing(rules: dict[str, Rule]) -> None:
    baselines, notes = learn_baselines({("h100", RATE): {"n1": [600.0]}}, rules)
    assert baselines == {}
    assert "no baseline yet: only 1 nodes have a history" in notes[0].message


def test_only_compared_metrics_are_kept_of_what_ships() -> None:
    compared = compared_metrics(load_catalogue())
    assert "compute.gemm.bf16_tflops" in compared
    assert "host.uptime.seconds" not in compared


def digest(name: str, stack: str, value: str) -> Member:
    return Member(name, "h100", {DIGEST: [("0", value)], STACK: [("0", stack)]})


def test_only_nodes_that_report_the_same_companion_value_are_peers(rules: dict[str, Rule]) -> None:
    shipped = RuleBook(load_catalogue(), Profiles({})).by_metric()
    fleet = [digest(f"a{i}", "torch 2.13", "aaaa") for i in range(9)]
    fleet += [digest(f"b{i}", "torch 2.12", "bbbb") for i in range(4)]
    assert compare_peers(fleet, shipped).findings == {}
    fleet[2] = digest("a2", "torch 2.13", "bbbb")
    assert set(compare_peers(fleet, shipped).findings) == {"a2"}


def test_the_companion_of_a_compared_metric_is_kept() -> None:
    assert {DIGEST, STACK} <= compared_metrics(load_catalogue())
