"""What the PCI bus tells of any accelerator, whoever made it."""

import pytest

from probes.agent import vendors
from probes.agent.api import Ran, Unsupported
from probes.checks import pci
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import (
    HGX,
    NVIDIA_QUERY,
    collect,
    drivers,
    findings,
    nvidia_report,
    passes,
    pci_files,
    values,
)
from tests.probes.replay import ReplayHost

CARDS = ("0000:01:00.0", "0000:41:00.0")


def unknown_make(**changes: str) -> ReplayHost:
    return ReplayHost(
        files=pci_files(CARDS, "1e52:401e", "0x120000", **changes), links=drivers(CARDS, "tenstorrent")
    )


@pytest.mark.parametrize("check", ["count", "pcie", "aer"])
def test_an_accelerator_of_an_unknown_make_is_found_by_its_class(check: str) -> None:
    assert passes(check, unknown_make())


def test_an_accelerator_of_an_unknown_make_is_counted_and_identified() -> None:
    measures = collect("count", unknown_make())
    assert values(measures, "count") == {None: 2}
    assert set(values(measures, "pci_id").values()) == {"1e52:401e"}


def test_a_check_that_no_tool_can_answer_is_unsupported_not_healthy() -> None:
    with pytest.raises(Unsupported):
        collect("ecc", unknown_make())


def test_a_node_without_accelerators_counts_none() -> None:
    host = ReplayHost(files=pci_files(["0000:03:00.0"], "1a03:2000", "0x030000"))
    assert values(collect("count", host), "count") == {None: 0}
    assert passes("count", ReplayHost(), sku="generic-cpu")
    assert findings("count", unknown_make(), sku="generic-cpu")["count", None].outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("identity", "pci_class", "bus", "expected"),
    [
        ("10de:1e04", "0x030000", "0000:02:00.0", True),
        ("1002:74a1", "0x120000", "0000:05:00.0", True),
        ("1002:740f", "0x038000", "0000:05:00.0", True),
        ("1da3:1020", "0x120000", "0000:19:00.0", True),
        ("1a03:2000", "0x030000", "0000:03:00.0", False),
        ("19e5:1711", "0x030000", "0000:03:00.0", False),
        ("8086:0bd5", "0x038000", "0000:29:00.0", True),
        ("8086:7d1d", "0x120000", "0000:00:0b.0", False),
        ("15b3:101c", "0x020700", "0000:0d:00.0", False),
    ],
)
def test_devices_that_compute_are_told_from_screens_and_adapters(
    identity: str, pci_class: str, bus: str, expected: bool
) -> None:
    host = ReplayHost(files=pci_files([bus], identity, pci_class))
    assert bool(pci.accelerators(host)) is expected


def test_a_device_without_a_driver_fails_and_is_not_counted() -> None:
    host = ReplayHost(
        files=pci_files(CARDS, "1e52:401e", "0x120000"), links=drivers(CARDS[:1], "tenstorrent")
    )
    found = findings("count", host)
    assert set(found) == {("unbound", CARDS[1])}
    assert values(collect("count", host), "count") == {None: 1}


def test_a_narrow_link_fails_for_its_device() -> None:
    files = pci_files(CARDS, "1e52:401e", "0x120000")
    files[f"/sys/bus/pci/devices/{CARDS[1]}/current_link_width"] = "8\n"
    found = findings("pcie", ReplayHost(files=files))
    assert set(found) == {("lanes_lost", CARDS[1])}
    assert found["lanes_lost", CARDS[1]].value == 8


@pytest.mark.parametrize(("current", "most"), [("63", "63"), ("255", "255"), ("0", "16")])
def test_a_device_that_does_not_answer_on_its_link_is_no_pass(current: str, most: str) -> None:
    files = pci_files(CARDS, "1e52:401e", "0x120000")
    files[f"/sys/bus/pci/devices/{CARDS[1]}/current_link_width"] = current
    files[f"/sys/bus/pci/devices/{CARDS[1]}/max_link_width"] = most
    found = findings("pcie", ReplayHost(files=files))
    assert found["lanes_lost", CARDS[1]].outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("file", "text", "metric", "outcome"),
    [
        ("aer_dev_fatal", "Undefined 0\nSDES 2\nTOTAL_ERR_FATAL 2\n", "fatal", Outcome.FAIL),
        ("aer_dev_nonfatal", "CmpltTO 4\nUnsupReq 0\nTOTAL_ERR_NONFATAL 4\n", "nonfatal", Outcome.WARN),
    ],
)
def test_errors_that_the_device_reported_are_found(
    file: str, text: str, metric: str, outcome: Outcome
) -> None:
    found = findings("aer", unknown_make(**{file: text}))
    assert {device for _, device in found} == set(CARDS)
    assert found[metric, CARDS[0]].outcome is outcome


def test_requests_that_probing_the_bus_makes_are_no_errors() -> None:
    assert passes("aer", unknown_make(aer_dev_nonfatal="UnsupReq 9\nTOTAL_ERR_NONFATAL 9\n"))


@pytest.mark.parametrize(
    ("file", "text"), [("aer_dev_fatal", "garbage\n"), ("aer_dev_fatal", "TOTAL_ERR_FATAL x\n")]
)
def test_counters_that_cannot_be_understood_are_an_error(file: str, text: str) -> None:
    with pytest.raises(ValueError):
        collect("aer", unknown_make(**{file: text}))


def test_a_link_speed_that_cannot_be_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="link speed"):
        collect("pcie", unknown_make(current_link_speed="fast"))


def test_a_bus_without_link_facts_leaves_the_check_unsupported() -> None:
    files = {f"/sys/bus/pci/devices/{CARDS[0]}/class": "0x120000\n"}
    for check in ("pcie", "aer"):
        with pytest.raises(Unsupported):
            collect(check, ReplayHost(files=files))


@pytest.mark.parametrize(
    "text", ["00000000:3B:00.0", "0000:3b:00.0", "PCI:0000:3b:00", "3b:00.0", "0000:3B:00"]
)
def test_the_ways_to_write_a_bus_id_are_one(text: str) -> None:
    assert pci.normal_bus(text) == "0000:3b:00.0"


def test_two_makes_on_one_node_both_answer_and_their_devices_are_told_apart() -> None:
    nvidia, amd = HGX[:1], ("0000:65:00.0",)
    amd_folder = f"/sys/bus/pci/devices/{amd[0]}"
    host = ReplayHost(
        files={
            **pci_files(nvidia, "10de:2330"),
            **pci_files(amd, "1002:740f", "0x038000"),
            f"{amd_folder}/mem_info_vram_used": str(20 << 20),
            f"{amd_folder}/mem_info_vram_total": str(64 << 30),
        },
        links={**drivers(nvidia, "nvidia"), **drivers(amd, "amdgpu")},
        commands={NVIDIA_QUERY: nvidia_report(nvidia)},
    )
    measures = collect("idle_memory", host)
    assert values(measures, "used") == {"nvidia:0": 4 << 20, "amd:0": 20 << 20}
    assert values(collect("count", host), "count") == {None: 2}


def test_a_make_whose_tool_is_missing_is_not_hidden_by_the_one_that_answers() -> None:
    nvidia, gaudi = HGX[:1], ("0000:65:00.0",)
    host = ReplayHost(
        files={**pci_files(nvidia, "10de:2330"), **pci_files(gaudi, "1da3:1020", "0x120000")},
        commands={("nvidia-smi", "-L"): Ran(0, "GPU 0: H100\n", "")},
    )
    found = findings("tool_responds", host)
    assert found["status", "Intel Gaudi"].outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ("1e52:*", True),
        ("1e52:401e", True),
        ("dead:beef 1e52:401e", True),
        ("1e52:b140", False),
        ("nonsense", None),
    ],
)
def test_a_device_that_an_adapter_names_is_recognised_by_its_pci_id(
    needs: str, expected: bool | None
) -> None:
    assert vendors.shown(needs, unknown_make()) is expected


def test_a_device_that_an_adapter_names_is_recognised_by_its_device_node() -> None:
    assert vendors.shown("/dev/acme[0-9]*", ReplayHost(files={"/dev/acme0": ""})) is True
    assert vendors.shown("/dev/acme[0-9]*", ReplayHost()) is False
