# ruff: noqa: E501 - lines stand here as the tools and drivers print them
"""Driver events in the kernel log: real captures of Xid, and lines as the drivers' sources print them."""

import re
from pathlib import Path

import pytest

from probes.agent.api import Ran, Unsupported
from probes.checks import driver_events, kernel_log
from probes.checks.kernel_log import Line
from probes.model import Outcome
from tests.probes.checks.accelerator_nodes import collect, findings, judge, params, passes, values
from tests.probes.replay import ReplayHost

UPTIME = 90_000.0
TABLES = driver_events.read_tables(params("driver_events"))


def node(*lines: tuple[float, str], **more: object) -> ReplayHost:
    """A node up for 25 hours; `lines`: seconds after boot, text."""
    log = "".join(f"4,{i},{round(stamp * 1e6)},-;{text}\n" for i, (stamp, text) in enumerate(lines))
    files: dict[str, str | bytes | Exception] = {"/proc/uptime": f"{UPTIME} 1.0\n", "/dev/kmsg": log}
    return ReplayHost(files=files, params=dict(more))


BOOT = (1.0, "Linux version 5.15.0-112-generic")
NOW = UPTIME - 100.0
GPU = "0000:9b:00.0"


def test_a_quiet_log_passes() -> None:
    host = node(BOOT, (NOW, "nvidia-nvswitch3: open (major=510)"))
    assert passes("driver_events", host)
    assert values(collect("driver_events", host), "hours_covered") == {None: 24}


FATAL = [
    "NVRM: Xid (PCI:0000:9b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    "NVRM: Xid (PCI:0000:9b:00): 119, pid=1, name=nvidia-smi, Timeout after 6s of waiting for RPC response from GPU4 GSP!",
    "NVRM: Xid (PCI:0000:9b:00): 48, pid=7, name=python, An uncorrectable double bit error (DBE) has been detected",
    "NVRM: Xid (PCI:0000:9b:00): 64, pid=1896, Row Remapper: Failed to remap row",
    "NVRM: Xid (PCI:0000:9b:00): 95, pid=1, name=x, Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No",
    "NVRM: Xid (0000:9b:00): 62, 2204(2204) 00000000 00000000",
    "NVRM: Xid (PCI:0000:9b:00 GPU-I:03): 46, pid=1, name=x, timeout",
    "NVRM: Xid (PCI:0000:9b:00): 145, RLW_RXPIPE Fatal XC0 i0 Link 07 (0x004000c6 0x00000001)",
    "NVRM: GPU 0000:9b:00.0: RmInitAdapter failed! (0x62:0x55:2477)",
    "amdgpu 0000:9b:00.0: amdgpu: ring comp_1.0.0 timeout, signaled seq=2662395, emitted seq=2662397",
    "amdgpu 0000:9b:00.0: amdgpu: GPU reset begin!",
    "amdgpu 0000:9b:00.0: amdgpu: GPU reset(2) failed",
    "amdgpu 0000:9b:00.0: amdgpu: 3 uncorrectable hardware errors detected in umc block",
    "amdgpu 0000:9b:00.0: amdgpu: uncorrectable hardware error(ERREVENT_ATHUB_INTERRUPT) detected!",
    "amdgpu 0000:9b:00.0: amdgpu: RAS records:257 exceed threshold:256",
    "amdgpu 0000:9b:00.0: amdgpu: MES failed to respond to msg=REMOVE_QUEUE",
    "amdgpu 0000:9b:00.0: amdgpu: SMU: I'm not done with your previous command",
    "habanalabs 0000:9b:00.0: Failed to reset! Device is NOT usable",
    "habanalabs 0000:9b:00.0: Device heartbeat failed!",
]


@pytest.mark.parametrize("line", FATAL)
def test_an_event_that_needs_a_reset_or_more_fails_for_its_device(line: str) -> None:
    host = node(BOOT, (NOW, line))
    found = findings("driver_events", host)
    assert set(found) == {("fatal", GPU)}
    assert found["fatal", GPU].outcome is Outcome.FAIL
    assert any(line in evidence for evidence in host.evidence)


HARMLESS = [
    "NVRM: Xid (PCI:0000:9b:00): 45, pid=2345, name=python, Ch 00000010",
    "NVRM: Xid (PCI:0000:9b:00): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.",
    "NVRM: Xid (PCI:0000:9b:00): 31, pid=31297, name=python, Ch 00000008, intr 00000000. MMU Fault",
    "NVRM: Xid (PCI:0000:9b:00): 94, pid=2, name=python, Contained: CE User Channel (0x9). RST: No, D-RST: No",
    "nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32 egress non-posted PRIV error (First)",
    "nvidia-nvswitch2: SXid (PCI:0000:07:00.0): 20034, Severity 1 Engine instance 60 Sub-engine instance 00",
    "amdgpu 0000:9b:00.0: amdgpu: 0 uncorrectable hardware errors detected in umc block",
    "amdgpu 0000:9b:00.0: amdgpu: [gfxhub0] no-retry page fault (src_id:0 ring:24 vmid:3 pasid:32770)",
    "NVRM: GPU Board Serial Number: 1650124014249",
]


@pytest.mark.parametrize("line", HARMLESS)
def test_consequences_information_and_programs_faults_are_no_findings(line: str) -> None:
    assert passes("driver_events", node(BOOT, (NOW, line)))


WARNINGS = [
    ("NVRM: Xid (PCI:0000:9b:00): 92, High single-bit ECC error rate", "warning"),
    (
        "NVRM: Xid (PCI:0000:9b:00): 145, RLW_RXPIPE Nonfatal XC0 i0 Link 07 (0x004000c6 0x00000001)",
        "warning",
    ),
    ("NVRM: Xid (PCI:0000:9b:00): 999, something new", "unknown"),
    (
        "amdgpu 0000:9b:00.0: amdgpu: socket: 0, die: 0 3 correctable hardware errors detected in umc block",
        "warning",
    ),
]


@pytest.mark.parametrize(("line", "metric"), WARNINGS)
def test_events_that_announce_trouble_or_are_unknown_are_warnings(line: str, metric: str) -> None:
    found = findings("driver_events", node(BOOT, (NOW, line)))
    assert {key: finding.outcome for key, finding in found.items()} == {(metric, GPU): Outcome.WARN}


def test_a_fatal_error_of_a_switch_names_the_switch() -> None:
    line = "nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 63 LTSSM Fault Up"
    assert set(findings("driver_events", node(BOOT, (NOW, line)))) == {("fatal", "0000:05:00.0")}


ALWAYS_FATAL = ["10003", "12020", "22003", "22011", *map(str, range(23001, 23018))]
"""NVIDIA fabric manager user guide, appendix D: fatal to the entire fabric, the host is to be restarted."""


@pytest.mark.parametrize("word", ["Fatal, ", ""], ids=["by its own word", "by the table alone"])
@pytest.mark.parametrize("code", ALWAYS_FATAL)
def test_a_switch_error_that_stops_the_whole_fabric_asks_for_a_restart_of_the_node(
    code: str, word: str
) -> None:
    line = f"nvidia-nvswitch0: SXid (PCI:0000:05:00.0): {code}, {word}Link 63 egress sequence ID error"
    found = findings("driver_events", node(BOOT, (NOW, line)))
    assert set(found) == {("fatal", "0000:05:00.0"), ("advice", "0000:05:00.0")}
    assert found["advice", "0000:05:00.0"].value == "restart the node"
    assert found["advice", "0000:05:00.0"].outcome is Outcome.FAIL
    assert "restart" in found["advice", "0000:05:00.0"].action


def test_other_fatal_switch_errors_ask_for_a_reset_and_the_drivers_word_goes_before_the_table() -> None:
    def kinds(rest: str) -> list[str]:
        line = f"nvidia-nvswitch0: SXid (PCI:0000:05:00.0): {rest}"
        return [event.kind for event in driver_events.parse([Line(60.0, line)], TABLES)]

    assert kinds("20034, Link 63 LTSSM Fault Up") == ["reset"]
    assert kinds("99999, Fatal, Link 63 something new") == ["reset"]
    assert kinds("23001, Non-fatal, Link 63 ingress error") == ["information"]
    assert sum(error.kind == "restart" for error in TABLES.sxid.values()) == len(ALWAYS_FATAL) == 21


def test_the_drivers_last_advice_counts_and_can_be_taken_back() -> None:
    told = "NVRM: Xid (PCI:0000:9b:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
    taken = "NVRM: Xid (PCI:0000:9b:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"
    found = findings("driver_events", node(BOOT, (NOW, told)))
    assert found["advice", GPU].value == "gpu reset required"
    assert passes("driver_events", node(BOOT, (NOW, told), (NOW + 5, taken)))


def test_programs_that_fault_in_one_place_point_to_the_place() -> None:
    def fault(pid: int, sm: int) -> tuple[float, str]:
        where = f"Graphics SM Warp Exception on (GPC 5, TPC 2, SM {sm}): Out Of Range Address"
        return NOW + pid / 1000, f"NVRM: Xid (PCI:0000:9b:00): 13, pid={pid}, name=python, {where}"

    assert passes("driver_events", node(BOOT, *[fault(pid, pid % 2) for pid in range(4)]))
    assert passes("driver_events", node(BOOT, *[fault(7, 0)] * 9)), (
        "one program, however often, is its author's"
    )
    found = findings("driver_events", node(BOOT, *[fault(pid, 0) for pid in range(3)]))
    assert found["same_unit", GPU].value == 3


def test_events_before_this_boot_or_before_the_window_do_not_count() -> None:
    old = "NVRM: Xid (PCI:0000:9b:00): 79, pid=1, GPU has fallen off the bus."
    assert passes("driver_events", node(BOOT, (10.0, old)))
    assert findings("driver_events", node(BOOT, (10.0, old), hours=48))
    journal = tuple(kernel_log.journal_command(24))
    boot = 1_700_000_000
    host = ReplayHost(
        files={
            "/proc/uptime": "600.0 1.0\n",
            "/proc/stat": f"btime {boot}\n",
            "/dev/kmsg": "4,0,1000000,-;Linux version\n",
        },
        commands={journal: f"{boot - 3600}.5 node1 kernel: {old}\n"},
    )
    assert passes("driver_events", host)


def test_a_log_that_may_not_be_read_leaves_the_check_unsupported_with_the_reason() -> None:
    host = ReplayHost(
        files={"/proc/uptime": "600.0 1.0\n", "/dev/kmsg": Unsupported("/dev/kmsg: Operation not permitted")},
        commands={("dmesg", "-r"): Ran(1, "", "dmesg: read kernel buffer failed: Operation not permitted")},
    )
    with pytest.raises(Unsupported, match="probe as root"):
        collect("driver_events", host)


def test_a_real_gsp_timeout_is_found_with_its_gpu_and_lines(captures: Path) -> None:
    text = (captures / "captures/kernel/dmesg-xid-119.log").read_text()
    lines = [Line(60.0, re.sub(r"^\[[^]]*\] ", "", line)) for line in text.splitlines()]
    events = driver_events.parse(lines, TABLES)
    assert {(event.device, event.code, event.kind) for event in events} == {(GPU, "xid 119", "reset")}
    judged = judge("driver_events", driver_events.measures(events))
    assert judged.outcome is Outcome.FAIL
    assert driver_events.summary(events) == f"xid 119 x{len(events)}"
    assert "GSP" in driver_events.evidence(events)[0]


def test_a_real_log_without_errors_has_no_events_and_one_of_peer_memory_warns(captures: Path) -> None:
    def events(name: str) -> list[driver_events.Event]:
        text = (captures / "captures/kernel" / name).read_text()
        return driver_events.parse([Line(60.0, line.partition(";")[2]) for line in text.splitlines()], TABLES)

    assert events("kmsg.1.log") == []
    assert {event.code for event in events("kmsg.2.peermem.log")} == {"peermem_context"}


def test_every_code_and_message_of_the_table_has_a_known_class_and_a_meaning() -> None:
    known = {*driver_events.GRAVE, "warning", "application", "consequence", "information", "by_line"}
    assert {kind for kind, _ in TABLES.xid.values()} <= known
    assert {message.kind for message in TABLES.messages} <= known
    assert {error.kind for error in TABLES.sxid.values()} <= known
    assert all(error.means for error in TABLES.sxid.values())
    assert all(means for _, means in TABLES.xid.values())
    assert all(message.means for message in TABLES.messages)
    assert {code: TABLES.xid[code][0] for code in ("45", "63", "94", "79", "154")} == {
        "45": "consequence", "63": "information", "94": "application", "79": "restart", "154": "information",
    }  # fmt: skip
    assert {TABLES.xid[code][0] for code in ("46", "62", "95", "109", "119", "120", "140")} == {"reset"}


@pytest.mark.parametrize(
    "broken", [{"xid": None}, {"messages": [{"make": "x"}]}, {"sxid": 3}, {"sxid": [{"codes": [1]}]}]
)
def test_a_table_of_another_shape_is_an_error(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        driver_events.read_tables({**params("driver_events"), **broken})
