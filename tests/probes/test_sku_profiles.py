"""The SKU profiles that ship: complete, sourced, recognised by the devices they are about, and strict."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from inventory.document import load
from inventory.errors import DocumentError
from inventory.fleet import Node
from inventory.sources import load as load_fleet
from probes.catalogue import Catalogue, ProfileFile, load_catalogue
from probes.criteria import judge
from probes.limits import Operator
from probes.model import CheckRecord, Finding, Measure, Outcome, Status, Value
from probes.profiles import BUILT_IN, Profiles, RuleBook, load_profiles

FILES = sorted(BUILT_IN.glob("*.yaml"))
INVENTORIES = Path(__file__).parents[2] / "examples" / "inventories"


@cache
def shipped() -> Catalogue:
    return load_catalogue()


@cache
def book() -> RuleBook:
    return RuleBook(shipped(), load_profiles(shipped()))


def findings(sku: str, check: str, measures: Mapping[str, Value]) -> list[Finding]:
    """What a node of `sku` is told of a check that measured these, once for the node."""
    record = CheckRecord(
        check, Status.ANSWERED, measures=tuple(Measure(name, None, value) for name, value in measures.items())
    )
    return list(judge(book().kind(Node("n", sku=sku)).rules, check, record).findings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_limit_of_a_profile_names_its_source(path: Path) -> None:
    profile = load(path, ProfileFile)
    assert profile.sku == path.stem
    # One profile is there to say that nothing more is known.
    assert profile.limits or profile.sku == "generic-accelerator"
    assert [name for name, limit in profile.limits.items() if not limit.reference] == []


def test_every_default_limit_of_the_catalogue_names_its_source() -> None:
    unsourced = [
        f"{check.name}.{metric}"
        for check in shipped()
        for metric, demand in check.demands.items()
        if not demand.reference
    ]
    assert unsourced == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_profile_with_accelerators_says_whose_and_how_many(path: Path) -> None:
    profile = load(path, ProfileFile)
    assert bool(profile.vendor) == bool(profile.pci) == bool(profile.accelerators)


@pytest.mark.parametrize(
    ("pci", "sku"),
    [
        ("10de:2330", "h100-sxm"), ("10de:2335", "h200-sxm"), ("10de:2901", "b200-sxm"),
        ("10de:20b2", "a100-sxm-80"), ("10de:20b0", "a100-sxm-40"), ("1002:740c", "mi250x"),
        ("1002:74a1", "mi300x"), ("1002:74b5", "mi300x"), ("1da3:1020", "gaudi2"), ("1da3:1060", "gaudi3"),
        ("19e5:d802", "ascend910b"),
    ],
)  # fmt: skip
def test_a_node_without_a_named_sku_is_recognised_by_its_devices(pci: str, sku: str) -> None:
    found = book().profiles.recognise([pci])
    assert found is not None
    assert found.name == sku


def test_a_real_a100_node_is_recognised(captures: Path) -> None:
    text = (captures / "captures/nvidia/lspci.nn.a100").read_text()
    ids = {line.split("[")[-1][:9] for line in text.splitlines() if "[0302]" in line}
    found = book().profiles.recognise(ids)
    assert found is not None
    assert found.name == "a100-sxm-80"


def test_every_sku_with_accelerators_is_held_to_what_any_node_of_a_cluster_must_show() -> None:
    profiles = book().profiles
    base = profiles.find("cluster-node").demands
    for profile in profiles.by_name.values():
        if profile.accelerators:
            assert set(base) <= set(profile.demands), profile.name
            assert profile.demands["host.swap.total"].source == "sku:cluster-node"
            assert "host.kernel_faults" in profile.essential


@pytest.mark.parametrize(
    ("check", "measures", "outcome"),
    [
        ("host.swap", {"total": 8 << 30}, Outcome.WARN),
        ("host.processes", {"zombies": 0, "stuck": 1}, Outcome.FAIL),
        ("host.uptime", {"seconds": 120.0}, Outcome.WARN),
        ("host.limits", {"locked_memory": 8 << 20, "open_files": 1 << 20}, Outcome.WARN),
        ("host.limits", {"locked_memory": (1 << 63) - 1, "open_files": 4096}, Outcome.WARN),
        ("host.time_sync", {"synchronised": False}, Outcome.WARN),
        ("host.time_sync", {"synchronised": True, "offset": 0.02}, Outcome.WARN),
        ("host.time_sync", {"synchronised": True, "offset": 7.0}, Outcome.FAIL),
        ("host.frequency", {"governor": "powersave"}, Outcome.WARN),
        ("host.iommu", {"mode": "off", "redirecting_bridges": 3}, Outcome.WARN),
        ("network.affinity", {"without_network": 4, "unknown_node": 0}, Outcome.WARN),
        ("collective.nccl_tests", {"average_bus_gb_s": 455.0}, Outcome.FAIL),
        ("compute.gemm", {"bf16_tflops": 590.0, "failed": 0, "unmeasured_devices": 0}, Outcome.WARN),
        ("compute.gemm", {"bf16_tflops": 480.0, "failed": 0, "unmeasured_devices": 0}, Outcome.FAIL),
    ],
)  # fmt: skip
def test_a_slip_that_a_laptop_may_have_is_found_on_a_training_node(
    check: str, measures: dict[str, Value], outcome: Outcome
) -> None:
    assert [finding.outcome for finding in findings("h100", check, measures)] == [outcome]


@pytest.mark.parametrize("metric", ["soft_lockup", "rcu_stall"])
def test_one_cpu_that_stood_still_fails_a_training_node_and_warns_of_another(metric: str) -> None:
    faults: dict[str, Value] = dict.fromkeys(
        ("panic", "oops", "soft_lockup", "hard_lockup", "rcu_stall", "hung_task"), 0
    )
    one = {**faults, metric: 1}
    assert [finding.outcome for finding in findings("h100", "host.kernel_faults", one)] == [Outcome.FAIL]
    assert [finding.outcome for finding in findings("cpu", "host.kernel_faults", one)] == [Outcome.WARN]
    # A file server that hung once hung every node: that alone must not empty the cluster.
    hung = {**faults, "hung_task": 1}
    assert [finding.outcome for finding in findings("h100", "host.kernel_faults", hung)] == [Outcome.WARN]


def test_what_a_virtual_machine_cannot_tell_is_not_held_against_it() -> None:
    assert findings("h100", "host.frequency", {"average_mhz": 2100.0}) == []
    assert findings("h100", "host.iommu", {"groups": 0, "mode": "off"}) == []
    assert findings("h100", "host.time_sync", {"synchronised": True}) == []
    assert findings("mi300x", "accelerator.power", {"draw": 140.0, "below_default": 0}) == []


def test_what_every_node_can_tell_must_be_told() -> None:
    (found,) = findings("h100", "host.swap", {"used": 0})
    assert (found.outcome, found.metric, found.source) == (Outcome.UNKNOWN, "total", "sku:cluster-node")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_warning_comes_before_the_failure(path: Path) -> None:
    """Else the warning could never be seen, or a failure would pass without one."""
    for name, demand in book().profiles.find(path.stem).demands.items():
        if demand.fail is None or demand.warn is None:
            continue
        assert demand.fail.operator == demand.warn.operator, name
        (fail,), (warn,) = demand.fail.operands, demand.warn.operands
        assert isinstance(fail, int | float)
        assert isinstance(warn, int | float)
        if demand.fail.operator in (Operator.MORE, Operator.AT_LEAST):
            assert warn > fail, name
        else:
            assert warn < fail, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_limit_on_an_all_reduce_comes_with_the_size_that_it_is_for(path: Path) -> None:
    profile = book().profiles.find(path.stem)
    limited = "collective.nccl_tests.average_bus_gb_s" in profile.demands
    sizes = profile.params.get("collective.nccl_tests", {})
    assert limited == bool(sizes)
    assert sizes.get("begin") == sizes.get("end")


def test_an_inventory_says_what_a_sku_cannot() -> None:
    nodes = load_fleet(str(INVENTORIES / "fabric.yaml")).nodes
    book().check(nodes.values())
    gpu = nodes["gpu001"]
    rule = book().kind(gpu).rules.rule("network.rdma_ports", "active")
    assert rule is not None
    assert rule.demand is not None
    assert (str(rule.demand.fail), rule.demand.source) == ("== 9", "inventory")
    assert book().kind(gpu).rules.rule("host.swap", "total") is not None


HEAD = "schema: ltpctl/sku/1\nwhat: Ours.\n"


def extended(folder: Path, **files: str) -> Profiles:
    """The shipped profiles and these, each written with its name as SKU."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"{HEAD}sku: {name}\n{text}")
    return load_profiles(shipped(), [folder])


def test_a_site_extends_a_shipped_profile_and_its_own_limits_win(tmp_path: Path) -> None:
    profiles = extended(
        tmp_path,
        ours=(
            "extends: H100-SXM\naccelerators: 8\nlimits:\n"
            '  host.swap.total: {fail: "== 0"}\n'
            "params: {collective.nccl_tests: {limit: 60}}\nskip: [accelerator.peermem]\n"
        ),
    )
    ours, h100 = profiles.find("ours"), profiles.find("h100")
    assert ours.demands["host.swap.total"].source == "sku:ours"
    assert ours.demands["accelerator.links.up"] == h100.demands["accelerator.links.up"]
    assert ours.params["collective.nccl_tests"] == {"begin": "16G", "end": "16G", "limit": 60}
    assert ours.skip == {"accelerator.peermem"}
    # Names and devices stay with the profile that says them: a node's SKU must be unambiguous.
    assert (ours.aliases, ours.pci) == ((), frozenset())
    assert profiles.recognise(["10de:2330"]) == h100


def test_a_site_that_corrects_the_base_corrects_all_that_extend_it(tmp_path: Path) -> None:
    text = 'limits:\n  host.uptime.seconds: {warn: ">= 60"}\n'
    profiles = extended(tmp_path, **{"cluster-node": text})
    demand = profiles.find("h200").demands["host.uptime.seconds"]
    assert str(demand.warn) == ">= 60"
    assert "host.swap.total" not in profiles.find("h200").demands


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"ours": "extends: h1000\n"}, r"ours.yaml:4: extends: no profile is called 'h1000'"),
        ({"ours": "extends: ours\n"}, r"ours.yaml:4: extends: 'ours' extends this profile itself"),
        ({"a": "extends: b\n", "b": "extends: a\n"}, r"extends this profile itself"),
    ],
)
def test_a_profile_that_extends_nothing_or_itself_is_refused_with_its_line(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    with pytest.raises(DocumentError, match=says):
        extended(tmp_path, **files)
