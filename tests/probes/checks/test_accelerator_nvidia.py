# ruff: noqa: E501 - lines stand here as the tools and drivers print them
"""NVIDIA devices: reports as nvidia-smi writes them, healthy, broken, of old drivers, of GPUs that are gone."""

from pathlib import Path

import pytest

from probes.agent.api import Ran, TimedOut, Unsupported
from probes.checks import nvidia, nvlink
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import (
    HGX,
    NVIDIA_QUERY,
    collect,
    drivers,
    findings,
    hgx,
    judge,
    nvidia_report,
    passes,
    pci_files,
    values,
)
from tests.probes.replay import ReplayHost

FROM_THE_REPORT = [
    "versions", "health", "ecc", "remapped_rows", "clocks", "throttle", "temperature", "power", "idle_memory",
    "processes", "persistence", "partition", "fabric",
]  # fmt: skip


@pytest.mark.parametrize("check", [*FROM_THE_REPORT, "count", "pcie", "aer", "peermem"])
def test_a_healthy_h100_node_passes_every_check(check: str) -> None:
    assert passes(check, hgx(), sku="h100-sxm")


def test_the_devices_of_a_healthy_node_are_counted_and_identified() -> None:
    measures = collect("count", hgx())
    assert values(measures, "count") == {None: 8}
    assert values(measures, "pci_id") == dict.fromkeys(HGX, "10de:2330")


FAULTS = [
    ("health", "<gpu_recovery_action>None<", "<gpu_recovery_action>Reset<", "state", Outcome.FAIL),
    ("health", "<gpu_recovery_action>None<", "<gpu_recovery_action>Drain and Reset<", "state", Outcome.FAIL),
    ("ecc", "<current_ecc>Enabled<", "<current_ecc>Disabled<", "mode", Outcome.FAIL),
    ("ecc", "<dram_uncorrectable>0<", "<dram_uncorrectable>3<", "uncorrectable", Outcome.FAIL),
    ("ecc", "<sram_uncorrectable_parity>0<", "<sram_uncorrectable_parity>1<", "uncorrectable", Outcome.FAIL),
    ("ecc", "exceeded>No<", "exceeded>Yes<", "sram_threshold_exceeded", Outcome.FAIL),
    ("ecc", "<dram_uncorrectable>0<", "<dram_uncorrectable>ERR!<", "uncorrectable", Outcome.UNKNOWN),
    ("remapped_rows", "pending>No<", "pending>Yes<", "pending", Outcome.FAIL),
    ("remapped_rows", "failure>No<", "failure>Yes<", "failed", Outcome.FAIL),
    ("remapped_rows", "none>0 bank", "none>2 bank", "banks_exhausted", Outcome.WARN),
    ("throttle", "hw_slowdown>Not Active<", "hw_slowdown>Active<", "hw_slowdown", Outcome.FAIL),
    ("throttle", "hw_thermal_slowdown>Not Active<", "hw_thermal_slowdown>Active<", "thermal", Outcome.FAIL),
    ("throttle", "brake_slowdown>Not Active<", "brake_slowdown>Active<", "power_brake", Outcome.FAIL),
    ("throttle", "sw_thermal_slowdown>Not Active<", "sw_thermal_slowdown>Active<", "soft_thermal", Outcome.WARN),
    ("temperature", "<gpu_temp_tlimit>52 C<", "<gpu_temp_tlimit>-3 C<", "margin", Outcome.FAIL),
    ("temperature", "<gpu_temp_tlimit>52 C<", "<gpu_temp_tlimit>2 C<", "margin", Outcome.WARN),
    ("temperature", "<gpu_temp>33 C<", "<gpu_temp>Unknown Error<", "core", Outcome.FAIL),
    ("power", "<current_power_limit>700.00 W<", "<current_power_limit>500.00 W<", "below_default", Outcome.WARN),
    ("idle_memory", "<used>4 MiB<", "<used>40000 MiB<", "excess", Outcome.WARN),
    ("idle_memory", "<total>81559 MiB<", "<total>40000 MiB<", "total", Outcome.FAIL),
    ("persistence", "<persistence_mode>Enabled<", "<persistence_mode>Disabled<", "mode", Outcome.WARN),
    ("partition", "<current_mig>Disabled<", "<current_mig>Enabled<", "mode", Outcome.FAIL),
    ("partition", "<pending_mig>Disabled<", "<pending_mig>Enabled<", "change_pending", Outcome.WARN),
    ("fabric", "<state>Completed<", "<state>In Progress<", "state", Outcome.FAIL),
    ("fabric", "<status>Success<", "<status>Insufficient Resources<", "status", Outcome.FAIL),
    ("fabric", "<route_unhealthy>False<", "<route_unhealthy>True<", "route_unhealthy", Outcome.FAIL),
    ("fabric", "<bandwidth>Full<", "<bandwidth>Degraded<", "bandwidth", Outcome.FAIL),
]  # fmt: skip


@pytest.mark.parametrize(("check", "healthy", "broken", "metric", "outcome"), FAULTS)
def test_a_fault_of_one_gpu_is_found_and_names_that_gpu(
    check: str, healthy: str, broken: str, metric: str, outcome: Outcome
) -> None:
    host = hgx(nvidia_report(changes={5: {healthy: broken}}))
    found = findings(check, host, sku="h100-sxm")
    assert found[metric, "5"].outcome is outcome
    assert {device for _, device in found} == {"5"}


def test_a_process_that_was_left_behind_is_named() -> None:
    process = (
        "<processes><process_info><pid>4711</pid><type>C</type><process_name>python3</process_name>"
        "<used_memory>512 MiB</used_memory></process_info>"
    )
    host = hgx(nvidia_report(changes={2: {"<processes>": process}}))
    assert findings("processes", host)["running", "2"].outcome is Outcome.WARN
    assert host.evidence == ["GPU 2: pid 4711 python3 (512 MiB)"]


LOST = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU\n"


def test_a_gpu_that_is_lost_is_named_by_its_bus_id_and_the_count_is_short() -> None:
    seven = nvidia_report(buses=[bus for bus in HGX if bus != "0000:3b:00.0"])
    host = hgx(Ran(0, seven, LOST))
    found = findings("count", host, sku="h100-sxm")
    assert found["count", None].value == 7
    assert found["missing", "0000:3b:00.0"].outcome is Outcome.FAIL
    assert set(found) == {("count", None), ("missing", "0000:3b:00.0")}
    assert "0000:3b:00.0 cannot be reached: GPU is lost" in host.evidence[0]


def test_a_tool_that_gives_up_over_a_lost_gpu_counts_nothing_and_says_which() -> None:
    host = hgx(Ran(255, LOST.replace("GPU 0000", "GPU0000").replace("GPU is lost", "Unknown Error"), ""))
    found = findings("count", host, sku="h100-sxm")
    assert found["count", None].value == 0
    assert found["missing", "0000:3b:00.0"].outcome is Outcome.FAIL
    assert any("0000:3b:00.0 cannot be reached: Unknown Error" in line for line in host.evidence)


def test_a_gpu_whose_fields_say_that_it_is_lost_is_not_counted() -> None:
    host = hgx(nvidia_report(changes={1: {"<gpu_temp>33 C<": "<gpu_temp>GPU is lost<"}}))
    found = findings("count", host, sku="h100-sxm")
    assert found["count", None].value == 7
    assert found["missing", "0000:3b:00.0"].outcome is Outcome.FAIL


def test_a_gpu_on_the_bus_that_the_tool_does_not_list_fails_by_itself() -> None:
    host = hgx(nvidia_report(buses=HGX[:-1]))
    found = findings("count", host)
    assert set(found) == {("missing", HGX[-1])}


def test_a_gpu_that_left_the_bus_too_makes_the_count_short() -> None:
    host = ReplayHost(
        files=pci_files(HGX[:-1], "10de:2330"),
        links=drivers(HGX[:-1], "nvidia"),
        commands={NVIDIA_QUERY: nvidia_report(buses=HGX[:-1])},
    )
    assert findings("count", host, sku="h100-sxm")["count", None].value == 7


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
        (18, "Failed to initialize NVML: Driver/library version mismatch"),
        (6, "No devices were found"),
    ],
)
def test_a_tool_without_any_gpu_fails_the_count_and_leaves_no_check_healthy(status: int, said: str) -> None:
    host = hgx(Ran(status, said + "\n", ""))
    found = findings("count", host, sku="h100-sxm")
    assert found["count", None].value == 0
    assert all(found["missing", bus].outcome is Outcome.FAIL for bus in HGX)
    assert any(said[:40] in line for line in host.evidence)
    for check in FROM_THE_REPORT:
        with pytest.raises(ValueError, match="no report"):
            collect(check, hgx(Ran(status, said + "\n", "")))


def test_without_the_tool_the_devices_are_counted_on_the_bus_and_other_checks_are_unsupported() -> None:
    host = ReplayHost(files=pci_files(HGX, "10de:2330"), links=drivers(HGX, "nvidia"))
    assert values(collect("count", host), "count") == {None: 8}
    assert "counted on the PCI bus only" in host.evidence[0]
    for check in [*FROM_THE_REPORT, "tool_responds"]:
        with pytest.raises(Unsupported, match="nvidia-smi"):
            collect(check, ReplayHost(files=pci_files(HGX, "10de:2330")))


@pytest.mark.parametrize("check", [*FROM_THE_REPORT, "count", "pcie"])
def test_a_tool_that_hangs_is_a_timeout_of_every_check_that_asks_it(check: str) -> None:
    host = hgx(TimedOut("nvidia-smi -q -x: no answer in 30 s"))
    with pytest.raises(TimedOut):
        collect(check, host)


def test_the_tools_shortest_answer_is_timed_and_its_status_judged() -> None:
    assert passes("tool_responds", hgx(commands={nvidia.LIST: "GPU 0: NVIDIA H100\n"}))
    host = hgx(commands={nvidia.LIST: Ran(255, "", "Unable to determine the device handle")})
    assert findings("tool_responds", host)["status", "nvidia"].outcome is Outcome.FAIL
    with pytest.raises(TimedOut):
        collect("tool_responds", hgx(commands={nvidia.LIST: TimedOut("hang")}))


@pytest.mark.parametrize("seconds", [16.0, 40.0])
def test_a_slow_tool_is_a_finding_before_it_hangs(seconds: float) -> None:
    from probes.agent.api import Measure

    judged = judge("tool_responds", [Measure("seconds", seconds, "nvidia"), Measure("status", 0, "nvidia")])
    assert judged.outcome is (Outcome.FAIL if seconds > 30 else Outcome.WARN)


@pytest.mark.parametrize(
    "text",
    [
        "", "hello\n", nvidia_report()[:4000], nvidia_report().replace("</gpu>", "", 1),
        nvidia_report().replace('id="00000000:19:00.0"', 'id="somewhere"'),
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_understood_is_an_error_not_a_pass(text: str) -> None:
    with pytest.raises(ValueError):
        collect("ecc", hgx(text))


def test_a_counter_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="banana"):
        collect(
            "ecc", hgx(nvidia_report(changes={0: {"<dram_uncorrectable>0<": "<dram_uncorrectable>banana<"}}))
        )


def test_consumer_cards_without_ecc_lack_only_what_they_do_not_have(captures: Path) -> None:
    report = (captures / "captures/nvidia/nvidia-smi-q-x.ecc-unsupported.xml").read_text()
    buses = ("0000:02:00.0", "0000:03:00.0")

    def host() -> ReplayHost:
        return ReplayHost(
            files=pci_files(buses, "10de:1e04", "0x030000"),
            links=drivers(buses, "nvidia"),
            commands={NVIDIA_QUERY: report},
        )

    for check in ("ecc", "remapped_rows", "partition", "fabric", "health"):
        with pytest.raises(Unsupported):
            collect(check, host())
    for check in (
        "count",
        "versions",
        "temperature",
        "power",
        "idle_memory",
        "processes",
        "throttle",
        "clocks",
    ):
        assert passes(check, host())
    assert values(collect("temperature", host()), "margin") == {"0": 67, "1": 67}


def test_a_report_of_2017_gives_the_processes_that_run(captures: Path) -> None:
    report = (captures / "captures/nvidia/nvidia-smi-q-x.sample.xml").read_text()
    buses = tuple(f"0000:{bus:02x}:00.0" for bus in range(1, 7))
    host = ReplayHost(files=pci_files(buses, "10de:1b81", "0x030000"), commands={NVIDIA_QUERY: report})
    measures = collect("processes", host)
    assert sum(int(str(value)) for value in values(measures, "running").values()) >= 3
    assert any("/usr/lib/xorg/Xorg" in line for line in host.evidence)


def links_node(state: str, errors: str) -> ReplayHost:
    return hgx(commands={nvlink.LINK_STATE: state, nvlink.LINK_ERRORS: errors})


def link_table(line: str, gpus: int = 8, links: int = 18) -> str:
    return "".join(
        f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu})\n"
        + "".join(line.format(link) for link in range(links))
        for gpu in range(gpus)
    )


UP = link_table("\t Link {0}: 26.562 GB/s\n")
NO_ERRORS = link_table(
    "\t Link {0}: Replay Errors: 0\n\t Link {0}: Recovery Errors: 0\n\t Link {0}: CRC Errors: 0\n"
)


def test_all_links_up_without_errors_pass() -> None:
    assert passes("links", links_node(UP, NO_ERRORS), sku="h100-sxm")


def test_one_link_down_fails_for_its_gpu() -> None:
    lines = UP.splitlines(keepends=True)
    lines[1 + 19 * 3] = "\t Link 0: <inactive>\n"
    found = findings("links", links_node("".join(lines), NO_ERRORS), sku="h100-sxm")
    assert found["down", "3"].value == 1
    assert found["up", "3"].value == 17


def test_all_links_inactive_fails_where_the_sku_has_links() -> None:
    down = link_table("\t Link {0}: <inactive>\n")
    found = findings("links", links_node(down, NO_ERRORS), sku="h100-sxm")
    assert {found["up", str(gpu)].value for gpu in range(8)} == {0}
    told = "".join(
        f"GPU {gpu}: NVIDIA H100\nUnable to retrieve NVLink information as all links are inActive\n"
        for gpu in range(8)
    )
    assert findings("links", links_node(told, ""), sku="h100-sxm")["up", "0"].value == 0


def test_a_link_that_trained_again_is_a_warning() -> None:
    errors = NO_ERRORS.replace("Link 4: Recovery Errors: 0", "Link 4: Recovery Errors: 7", 1)
    assert findings("links", links_node(UP, errors))["recoveries", "0"].value == 7


def test_the_links_of_a_real_a100_node_are_all_up(captures: Path) -> None:
    text = (captures / "captures/nvidia/nvidia-smi.nvlink.status.a100").read_text()
    measures = nvlink.count_links(nvlink.parse_links(text))
    assert set(values(measures, "up").values()) == {12}
    assert set(values(measures, "down").values()) == {0}


def test_gpus_without_nvlink_leave_the_check_unsupported() -> None:
    with pytest.raises(Unsupported):
        collect("links", links_node("GPU 0: Tesla T4 (UUID: GPU-0)\n", ""))


def test_a_fabric_manager_that_is_not_running_fails_where_switches_are_local() -> None:
    switch = pci_files(["0000:84:00.0"], "10de:22a3", "0x068000")

    def node(answer: Ran) -> ReplayHost:
        return hgx(files=switch, commands={nvlink.MANAGER_STATE: answer})

    assert passes("fabric", node(Ran(0, "active\n", "")))
    found = findings("fabric", node(Ran(3, "failed\n", "")))
    assert found["manager", None].outcome is Outcome.FAIL


def test_rdma_adapters_without_the_peer_memory_module_are_a_warning() -> None:
    adapter = {"/sys/class/infiniband/mlx5_0/node_type": "1: CA\n"}
    assert findings("peermem", hgx(files=adapter))["lacking", None].outcome is Outcome.WARN
    loaded = {**adapter, "/sys/module/nvidia_peermem/refcnt": "0\n"}
    assert passes("peermem", hgx(files=loaded))
