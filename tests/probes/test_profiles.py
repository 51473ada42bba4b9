"""Which kind a node is, and whose limits it is held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from probes.explain import explain
from probes.profiles import RuleBook, load_profiles, pci_ids
from tests.probes.catalogues import PROFILE, answered, catalogue, profiles


@pytest.fixture
def book(tmp_path: Path) -> RuleBook:
    checks = catalogue(tmp_path)
    return RuleBook(checks, profiles(tmp_path, checks))


def test_a_sku_is_found_by_name_and_alias_in_any_case(book: RuleBook) -> None:
    assert book.profiles.find("H100").name == book.profiles.find("hgx").name == "h100"


def test_an_unknown_sku_of_the_inventory_is_refused_with_place_and_nearest_name(book: RuleBook) -> None:
    with pytest.raises(UsageError, match=r"cluster.yaml:7: n1: sku: .*'h10'; did you mean h100"):
        book.check([Node("n1", sku="h10", origin="cluster.yaml:7")])


def test_a_node_without_a_sku_is_recognised_by_the_ids_that_it_shows(book: RuleBook) -> None:
    ids = pci_ids([answered("accelerator.count", ("count", 8), ("pci_id", "10DE:2330", "0"))])
    kind = book.kind(Node("n1"), ids)
    assert (kind.sku, kind.recognised) == ("h100", True)


def test_a_device_of_no_known_sku_makes_a_kind_of_its_own(book: RuleBook) -> None:
    kind = book.kind(Node("n1"), ["1abc:0001"])
    assert (kind.sku, kind.recognised, kind.profile) == ("pci:1abc:0001", False, None)
    assert book.kind(Node("n1")).sku is None


def test_ids_of_other_checks_are_not_accelerators() -> None:
    assert pci_ids([answered("network.rdma_devices", ("pci_id", "15b3:1021"))]) == frozenset()


def test_the_number_of_accelerators_is_a_limit_of_sku_and_inventory(book: RuleBook) -> None:
    def demand(node: Node) -> tuple[str, str]:
        rule = book.kind(node).rules.rule("accelerator.count", "count")
        assert rule is not None
        assert rule.demand is not None
        return str(rule.demand.fail), rule.demand.source

    assert demand(Node("n", sku="h100")) == ("== 8", "sku:h100")
    assert demand(Node("n", sku="h100", accelerators=4)) == ("== 4", "inventory")


def test_parameters_of_the_inventory_lie_over_those_of_the_sku(book: RuleBook) -> None:
    node = Node("n", sku="h100", vars={"params": {"accelerator.gemm": {"seconds": 1}}})
    assert book.params(node, book.kind(node)) == {"accelerator.gemm": {"size": 8192, "seconds": 1}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"limits": {"accelerator.gemm.bf16": "> fast"}}, "vars.limits.accelerator.gemm.bf16: .*'fast'"),
        ({"limits": {"accelerator.gemm.bf61": "> 1"}}, "did you mean accelerator.gemm.bf16"),
        ({"limits": {"accelerator.gemm.bf16": 600}}, "expected a limit such as"),
        ({"limits": {"accelerator.gemm.bf16": {"fial": "> 1"}}}, "expected a limit such as"),
        ({"limits": ["> 1"]}, "expected metric names"),
        ({"params": {"accelerator.gem": {}}}, "did you mean accelerator.gemm"),
        ({"params": {"accelerator.gemm": 3}}, "expected checks with their parameters"),
    ],
)
def test_a_mistake_in_the_inventory_is_told_before_anything_runs(
    book: RuleBook, given: dict, says: str
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        book.check([Node("n1", vars=given, origin="cluster.yaml:3")])
    assert str(error.value).startswith("cluster.yaml:3: n1: ")


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("accelerator.ecc.mode:", "accelerator.ecc.mood:", 9, "did you mean accelerator.ecc.mode"),
        ('">= 600"', '"600"', 10, "is not a limit"),
        ("  accelerator.gemm: {size", "  accelerator.gemn: {size", 12, "did you mean accelerator.gemm"),
        ("essential: [accelerator.versions]", "essential: [accelerator.version]", 13, "accelerator.versions"),
        ("vendor: nvidia", "vender: nvidia", 5, "did you mean 'vendor'"),
    ],
)
def test_a_mistake_in_a_profile_is_told_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, says: str
) -> None:
    assert old in PROFILE
    checks = catalogue(tmp_path)
    path, empty = tmp_path / "mine.yaml", tmp_path / "no_skus"
    empty.mkdir()
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises(UsageError) as error:
        load_profiles(checks, [path], built_in=empty)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert says in str(error.value)


def test_a_site_can_replace_a_profile_that_ships(tmp_path: Path) -> None:
    checks = catalogue(tmp_path)
    profiles(tmp_path, checks)
    mine = tmp_path / "mine.yaml"
    mine.write_text(PROFILE.replace(">= 600", ">= 500"))
    loaded = load_profiles(checks, [mine], built_in=tmp_path / "built_in_skus")
    assert str(loaded.find("h100").demands["accelerator.gemm.bf16"].fail) == ">= 500"


def test_two_profiles_cannot_claim_one_device(tmp_path: Path) -> None:
    checks = catalogue(tmp_path)
    with pytest.raises(UsageError, match="'10de:2330' belongs to h100 already"):
        profiles(tmp_path, checks, PROFILE, PROFILE.replace("h100", "other").replace("[hgx]", "[]"))


def test_an_explanation_has_the_limits_of_every_sku_with_their_sources(book: RuleBook) -> None:
    explained = explain("accelerator.ecc", book.catalogue, book.profiles)
    assert (explained.what, explained.fix, explained.how) == (
        "Counts memory errors.",
        "Reset the device.",
        "probes.checks.accelerator.ecc",
    )
    limits = {
        m.metric: [(lim.sku, lim.fail, lim.warn, lim.source) for lim in m.limits] for m in explained.metrics
    }
    assert limits == {
        "uncorrectable": [(None, "== 0", "== 0", "default")],
        "correctable": [(None, "", "< 10", "default")],
        "mode": [("h100", "== enabled", "", "sku:h100")],
    }
    assert explain("accelerator.versions", book.catalogue, book.profiles).essential_for == ("h100",)
    with pytest.raises(UsageError, match=r"did you mean accelerator\.ecc"):
        explain("accelerator.eec", book.catalogue, book.profiles)


def test_nodes_that_are_declared_line_by_line_share_the_rules_and_keep_their_own_lines(
    book: RuleBook,
) -> None:
    kinds = [
        book.kind(Node(f"n{i}", sku="h100", accelerators=8, origin=f"slurm.txt:{i}")) for i in range(100)
    ]
    shared = {id(check) for kind in kinds for check in kind.rules.checks.values()}
    counted = {id(kind.rules.checks["accelerator.count"]) for kind in kinds}
    assert len(counted) == len(kinds)
    assert len(shared - counted) == len(book.catalogue) - 1
    for number, kind in enumerate(kinds):
        rule = kind.rules.rule("accelerator.count", "count")
        assert rule is not None
        assert rule.demand is not None
        assert rule.demand.reference == f"slurm.txt:{number}"
        assert list(kind.rules.checks) == [check.name for check in book.catalogue]
        assert kind.essential == {
            "accelerator.count",
            "accelerator.versions",
            "accelerator.ecc",
            "accelerator.gemm",
        }
        assert kind.rules.expected_by == "the inventory"
