# ruff: noqa: E501 - lines stand here as the tools and drivers print them
"""AMD devices: amd-smi of ROCm 6 and 7, rocm-smi, and the driver's sysfs alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from probes.agent.api import Ran, TimedOut, Unsupported
from probes.checks import amd, amd_cards
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import (
    collect,
    drivers,
    findings,
    fixture,
    passes,
    pci_files,
    values,
)
from tests.probes.replay import Answer, ReplayHost

BUSES = tuple(f"0000:{bus:02x}:00.0" for bus in (0x05, 0x26, 0x46, 0x65, 0x85, 0xA6, 0xC6, 0xE5))


def listing(name: str, changes: Mapping[int, Mapping[str, str]] | None = None, wrap: bool = False) -> str:
    """One of amd-smi's documents for eight GPUs; `changes`: GPU -> text in its part -> what stands there instead."""
    parts = []
    for number, bus in enumerate(BUSES):
        part = fixture(f"amd/amd-smi-{name}.json").replace("{number}", str(number)).replace("{bus}", bus)
        for old, new in (changes or {}).get(number, {}).items():
            assert old in part
            part = part.replace(old, new, 1)
        parts.append(part)
    text = "[" + ",\n".join(parts) + "]"
    return '{"gpu_data": ' + text + "}" if wrap else text


def sysfs(**others: str) -> dict[str, str | bytes | Exception]:
    files = pci_files(BUSES, "1002:74a1", "0x120000")
    for number, bus in enumerate(BUSES):
        folder = f"/sys/bus/pci/devices/{bus}"
        for name, text in {
            "ras/umc_err_count": "ue: 0\nce: 0\nde: 0\n", "ras/gfx_err_count": "ue: 0\nce: 0\n",
            "ras/gpu_vram_bad_pages": "", "mem_info_vram_used": str(283 << 20), "mem_info_vram_total": str(192 << 30),
            "current_compute_partition": "SPX", "current_memory_partition": "NPS1", "vbios_version": "113-M3000100-000",
            "pcie_replay_count": "0", "hwmon/hwmon5/temp1_label": "junction", "hwmon/hwmon5/temp1_input": "42000",
            "hwmon/hwmon5/temp1_crit": "100000", "hwmon/hwmon5/power1_input": "142000000",
            "hwmon/hwmon5/power1_cap": "750000000", "hwmon/hwmon5/power1_cap_default": "750000000",
        }.items():  # fmt: skip
            files[f"{folder}/{name}"] = others.get(name, text) if number == 3 else text
        location = int(bus.split(":")[1], 16) << 8
        node = f"/sys/class/kfd/kfd/topology/nodes/{number + 2}/properties"
        files[node] = f"cpu_cores_count 0\nsimd_count 1216\nlocation_id {location}\ndomain 0\n"
    files["/sys/class/kfd/kfd/topology/nodes/0/properties"] = "cpu_cores_count 48\nsimd_count 0\n"
    files["/sys/module/amdgpu/version"] = "6.10.5\n"
    return files


def mi300x(
    changes: Mapping[str, Mapping[int, Mapping[str, str]]] | None = None,
    commands: Mapping[tuple[str, ...], Answer] | None = None,
    wrap: bool = False,
    **others: str,
) -> ReplayHost:
    """A node with amd-smi; `changes` by document."""
    told: dict[tuple[str, ...], Answer] = {
        argv: listing(name, (changes or {}).get(name), wrap)
        for argv, name in (
            (amd_cards.STATIC, "static"), (amd_cards.METRIC, "metric"), (amd.PROCESS, "process"), (amd.TOPOLOGY, "topology")
        )
    }  # fmt: skip
    return ReplayHost(
        files=sysfs(**others),
        links=drivers(BUSES, "amdgpu"),
        commands={**told, amd.LIST: "[]", **(commands or {})},
    )


def without_tools(**others: str) -> ReplayHost:
    return ReplayHost(files=sysfs(**others), links=drivers(BUSES, "amdgpu"))


ALL = [
    "count", "tool_responds", "versions", "health", "ecc", "remapped_rows", "clocks", "throttle", "temperature", "power",
    "idle_memory", "processes", "pcie", "links", "partition",
]  # fmt: skip


@pytest.mark.parametrize("wrap", [False, True], ids=["rocm6", "rocm7"])
@pytest.mark.parametrize("check", ALL)
def test_a_healthy_mi300x_node_passes_every_check(check: str, wrap: bool) -> None:
    assert passes(check, mi300x(wrap=wrap), sku="mi300x")


FAULTS = [
    ("ecc", "metric", '"total_uncorrectable_count": 0', '"total_uncorrectable_count": 2', "uncorrectable", Outcome.FAIL),
    ("ecc", "metric", '"total_deferred_count": 0', '"total_deferred_count": 1', "deferred", Outcome.WARN),
    ("throttle", "metric", '"prochot_violation_status": "NOT ACTIVE"', '"prochot_violation_status": "ACTIVE"', "power_brake", Outcome.FAIL),
    ("throttle", "metric", '"hbm_thermal_violation_status": "NOT ACTIVE"', '"hbm_thermal_violation_status": true', "thermal", Outcome.FAIL),
    ("throttle", "metric", '"UNTHROTTLED"', '"THROTTLED"', "hw_slowdown", Outcome.FAIL),
    ("temperature", "metric", '"value": 42,', '"value": 101,', "margin", Outcome.FAIL),
    ("power", "static", '"socket_power": {\n      "value": 750', '"socket_power": {\n      "value": 500', "below_default", Outcome.WARN),
    ("idle_memory", "metric", '"value": 283,', '"value": 90000,', "excess", Outcome.WARN),
    ("processes", "process", '"No running processes detected"', '{"name": "python3", "pid": 4711}', "running", Outcome.WARN),
    ("links", "topology", '"link_status": "ENABLED",\n      "link_type": "XGMI"', '"link_status": "DISABLED",\n      "link_type": "XGMI"', "down", Outcome.FAIL),
    ("links", "metric", "STATUS_NO_ERRORS", "STATUS_MULTIPLE_ERRORS", "errors", Outcome.FAIL),
    ("partition", "static", '"NPS1"', '"NPS4"', "memory_mode", Outcome.FAIL),
]  # fmt: skip


@pytest.mark.parametrize(("check", "document", "healthy", "broken", "metric", "outcome"), FAULTS)
def test_a_fault_of_one_gpu_is_found_and_names_that_gpu(
    check: str, document: str, healthy: str, broken: str, metric: str, outcome: Outcome
) -> None:
    found = findings(check, mi300x({document: {6: {healthy: broken}}}), sku="mi300x")
    assert found[metric, "6"].outcome is outcome
    assert {device for _, device in found} == {"6"}


@pytest.mark.parametrize(
    "check",
    [
        "versions",
        "ecc",
        "remapped_rows",
        "temperature",
        "power",
        "idle_memory",
        "pcie",
        "health",
        "partition",
    ],
)
def test_without_any_tool_the_drivers_sysfs_answers(check: str) -> None:
    assert passes(check, without_tools(), sku="mi300x")


@pytest.mark.parametrize(
    ("check", "file", "text", "metric", "device"),
    [
        ("ecc", "ras/umc_err_count", "ue: 1\nce: 4\n", "uncorrectable", "3"),
        ("remapped_rows", "ras/gpu_vram_bad_pages", "0x00001000 : 0x00001000 : P\n", "pending", BUSES[3]),
        ("remapped_rows", "ras/gpu_vram_bad_pages", "0x00001000 : 0x00001000 : F\n", "failed", BUSES[3]),
        ("temperature", "hwmon/hwmon5/temp1_input", "104000", "margin", "3"),
    ],
)
def test_a_fault_in_the_drivers_sysfs_is_found(
    check: str, file: str, text: str, metric: str, device: str
) -> None:
    found = findings(check, without_tools(**{file: text}))
    assert set(found) == {(metric, device)}
    assert found[metric, device].outcome is Outcome.FAIL


def test_a_gpu_that_the_compute_driver_does_not_know_fails() -> None:
    files = sysfs()
    del files["/sys/class/kfd/kfd/topology/nodes/4/properties"]
    found = findings("health", ReplayHost(files=files))
    assert set(found) == {("state", BUSES[2])}


def test_a_gpu_that_amd_smi_does_not_list_makes_the_count_short() -> None:
    seven = json.dumps(json.loads(listing("static"))[:7])
    found = findings("count", mi300x(commands={amd_cards.STATIC: seven}), sku="mi300x")
    assert found["missing", BUSES[7]].outcome is Outcome.FAIL
    assert found["count", None].value == 7


def test_rocm_smi_of_a_real_virtual_machine_answers(captures: Path) -> None:
    text = (captures / "captures/amd/rocm-smi-a.json").read_text()
    buses = tuple(json.loads(text)[f"card{number}"]["PCI Bus"].lower() for number in range(8))

    def host() -> ReplayHost:
        return ReplayHost(
            files=pci_files(buses, "1002:74b5", "0x120000"),
            links=drivers(buses, "amdgpu"),
            commands={amd_cards.ROCM: text, amd.SHOW_ID: "ok"},
        )

    for check in ("count", "tool_responds", "versions", "temperature", "clocks", "pcie"):
        assert passes(check, host(), sku="mi300x" if check == "count" else None)
    assert values(collect("temperature", host()), "core")["0"] == 45
    assert values(collect("clocks", host()), "core")["0"] == 2067
    assert findings("processes", host())["running", None].value == 1
    assert values(collect("pcie", host()), "replays") == {}, (
        "131070 is what a virtual function shows, not a count"
    )
    with pytest.raises(Unsupported):
        collect("ecc", host())


@pytest.mark.parametrize("answer", ["", "not json", "{}", '[{"card": 1}]', "[1, 2]"])
def test_an_answer_that_cannot_be_understood_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="amd-smi"):
        collect("temperature", mi300x(commands={amd_cards.METRIC: answer}))


def test_warnings_before_the_document_do_not_hide_it() -> None:
    warned = "WARNING: User is missing the following required groups: render\n" + listing("metric")
    assert passes("temperature", mi300x(commands={amd_cards.METRIC: warned}))


def test_a_failing_tool_is_an_error_and_a_hanging_one_a_timeout() -> None:
    with pytest.raises(ValueError):
        collect("ecc", mi300x(commands={amd_cards.METRIC: Ran(255, "", "AMDSMI_STATUS_INIT_ERROR")}))
    with pytest.raises(TimedOut):
        collect("ecc", mi300x(commands={amd_cards.METRIC: TimedOut("amd-smi metric")}))


def test_without_tool_or_driver_every_check_is_unsupported() -> None:
    for check in ("versions", "ecc", "temperature", "power", "idle_memory", "processes", "links", "health"):
        with pytest.raises(Unsupported):
            collect(check, ReplayHost(files=pci_files(BUSES, "1002:74a1", "0x120000")))
