"""The BMC's log and sensors, read with ipmitool on the node."""

from __future__ import annotations

import datetime

import pytest

from probes.agent.api import Ran, TimedOut
from probes.checks import bmc
from probes.model import Outcome, Status
from tests.probes.checks.server_node import SEL, catalogue, judged, record, server, text, values
from tests.probes.replay import Answer, ReplayHost

FAIL, WARN = Outcome.FAIL, Outcome.WARN
CHECKS = [check.name for check in catalogue() if check.family == "bmc"]
LOG = text("bmc/sel-elist.txt")
SENSORS = text("bmc/sdr-elist.txt")
SDR = ("ipmitool", "sdr", "elist")
INFO = ("ipmitool", "mc", "info")
NO_DEVICE = "Could not open device at /dev/ipmi0 or /dev/ipmi/0 or /dev/ipmidev/0: Permission denied\n"


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_on_a_healthy_server(name: str) -> None:
    assert judged(name, server()).outcome is Outcome.PASS


def entry(words: str, when: str = "11/21/2026 | 09:10:00") -> str:
    return f"{LOG}   5 | {when} | {words} | Asserted\n"


EVENTS = [
    ("power", FAIL, "Power Supply PS1 Status | Power Supply AC lost"),
    ("power", FAIL, "Power Supply PS2 Status | Failure detected"),
    ("power", FAIL, "Power Supply PS2 Status | Predictive failure"),
    ("power", FAIL, "Power Unit Pwr Redundancy | Redundancy Lost"),
    ("uncorrectable", FAIL, "Memory DIMM_A1 | Uncorrectable ECC"),
    ("uncorrectable", FAIL, "Critical Interrupt PCIe Slot 3 | Bus Fatal Error"),
    ("uncorrectable", FAIL, "Critical Interrupt | PCI SERR"),
    ("uncorrectable", FAIL, "Processor CPU1 | IERR"),
    ("uncorrectable", FAIL, "Processor CPU1 | Uncorrectable machine check exception"),
    ("correctable", WARN, "Memory DIMM_B2 | Correctable ECC"),
    ("correctable", WARN, "Memory DIMM_B2 | Correctable ECC logging limit reached"),
    ("throttled", FAIL, "Processor CPU1 | Throttled"),
    ("throttled", FAIL, "Processor CPU2 Prochot | State Asserted"),
    ("throttled", FAIL, "Processor CPU2 | Thermal Trip"),
    ("temperature", FAIL, "Temperature CPU1 Temp | Upper Critical going high"),
    ("fan", FAIL, "Fan FAN3 | Lower Critical going low"),
    ("fan", FAIL, "Fan FAN3 | Lower Non-recoverable going low"),
    ("fan", FAIL, "Fan Redundancy | Redundancy Lost"),
    ("watchdog", WARN, "Watchdog 2 | Hard reset"),
]


@pytest.mark.parametrize(("metric", "outcome", "words"), EVENTS)
def test_a_new_event_is_a_finding_of_its_kind(metric: str, outcome: Outcome, words: str) -> None:
    findings = judged("bmc.event_log", server(commands={SEL: entry(words)})).findings
    assert [(f.metric, f.outcome, f.value) for f in findings] == [(metric, outcome, 1)]
    assert any(words in line for line in findings[0].evidence)


@pytest.mark.parametrize(
    "words",
    [
        "OS Boot | C: boot completed",
        "Fan FAN3 | Lower Non-critical going low",
        "Temperature Inlet Temp | Upper Non-critical going high",
        "Power Supply PS1 Status | Presence detected",
        "Power Unit | Power off/down",
        "System Event | Timestamp Clock Sync",
    ],
)
def test_ordinary_events_are_counted_and_condemn_nobody(words: str) -> None:
    host = server(commands={SEL: entry(words)})
    assert judged("bmc.event_log", host).outcome is Outcome.PASS


def test_old_events_and_those_that_ended_do_not_count() -> None:
    ended = entry("Fan FAN3 | Lower Critical going low").replace("Asserted\n", "Deasserted\n")
    assert values("bmc.event_log", server(commands={SEL: ended}))["fan", None] == 0
    old = entry("Fan FAN3 | Lower Critical going low", "11/20/2026 | 09:40:00")
    assert values("bmc.event_log", server(commands={SEL: old}))["fan", None] == 0
    wider = server(commands={SEL: old}, params={"window_hours": 48})
    assert values("bmc.event_log", wider)["fan", None] == 1


def test_the_window_follows_the_bmcs_own_clock() -> None:
    clock = ("ipmitool", "sel", "time", "get")
    in_1970 = {
        SEL: entry("Fan FAN3 | Lower Critical going low", "01/01/1970 | 05:00:00"),
        clock: "01/01/1970 06:00:00\n",
    }
    assert values("bmc.event_log", server(commands=in_1970))["fan", None] == 1


def test_events_from_before_the_clock_was_set_are_counted_apart() -> None:
    assert values("bmc.event_log", server())["undated", None] == 1


def test_an_empty_log_is_healthy() -> None:
    empty = Ran(0, "", "SEL has no entries\n")
    assert judged("bmc.event_log", server(commands={SEL: empty})).outcome is Outcome.PASS


def test_a_log_that_is_nearly_full_is_a_warning() -> None:
    full = text("bmc/sel-info.txt").replace("1%", "97%")
    findings = judged("bmc.event_log", server(commands={("ipmitool", "sel", "info"): full})).findings
    assert [(f.metric, f.outcome) for f in findings] == [("used", WARN)]


def test_the_log_is_never_cleared() -> None:
    host = server()
    for name in CHECKS:
        record(name, host)
        host.params = {}
    assert {argv[1:3] for argv in host.asked} == {
        ("mc", "info"), ("sel", "elist"), ("sel", "time"), ("sel", "info"), ("sdr", "elist")
    }  # fmt: skip
    assert all(argv[3:] in ((), ("get",), ("last", "300")) for argv in host.asked)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("11/20/2026 14:03:22", datetime.datetime(2026, 11, 20, 14, 3, 22)),
        ("11/20/26 14:03:22 UTC", datetime.datetime(2026, 11, 20, 14, 3, 22)),
        ("11/20/2026 02:03:22 PM UTC", datetime.datetime(2026, 11, 20, 14, 3, 22)),
        ("11/20/2026 12:03:22 AM UTC", datetime.datetime(2026, 11, 20, 0, 3, 22)),
        ("Pre-Init  0000000012", None),
    ],
)
def test_the_times_of_several_versions_are_read(written: str, read: datetime.datetime | None) -> None:
    assert bmc.parse_clock(written) == read


SENSOR_FAULTS = [
    (
        "critical",
        FAIL,
        SENSORS.replace("FAN1             | 41h | ok  | 29.1 | 8400", "FAN1 | 41h | cr | 29.1 | 300"),
    ),
    ("warning", WARN, SENSORS.replace("07h | ok ", "07h | nc ")),
    (
        "power_faults",
        FAIL,
        SENSORS.replace("10.2 | Presence detected", "10.2 | Presence detected, Failure detected"),
    ),
    (
        "power_faults",
        FAIL,
        SENSORS.replace("10.2 | Presence detected", "10.2 | Presence detected, Power Supply AC lost"),
    ),
    ("readable", FAIL, "FAN1             | 41h | ns  | 29.1 | No Reading\n"),
]


@pytest.mark.parametrize(("metric", "outcome", "sensors"), SENSOR_FAULTS)
def test_a_sensor_beyond_its_threshold_is_a_finding(metric: str, outcome: Outcome, sensors: str) -> None:
    findings = judged("bmc.sensors", server(commands={SDR: sensors})).findings
    assert [(f.metric, f.outcome) for f in findings] == [(metric, outcome)]


def test_the_hottest_sensor_and_the_slowest_fan_are_facts() -> None:
    found = values("bmc.sensors", server())
    assert (found["hottest", None], found["slowest_fan", None], found["readable", None]) == (48.0, 8260.0, 7)


def test_a_bmc_that_refuses_is_a_failure_and_one_that_hangs_a_time_out() -> None:
    refused = Ran(1, "", "Get Device ID command failed: Node busy\n")
    findings = judged("bmc.reachable", server(commands={INFO: refused})).findings
    assert [(f.metric, f.outcome, f.evidence) for f in findings] == [
        ("answers", FAIL, ("Get Device ID command failed: Node busy",))
    ]
    assert record("bmc.reachable", server(commands={INFO: TimedOut("10 s")})).status is Status.TIMEOUT


def test_every_limit_of_the_family_has_a_fault_here() -> None:
    broken = {f"bmc.event_log.{m}" for m, *_ in EVENTS} | {f"bmc.sensors.{m}" for m, *_ in SENSOR_FAULTS}
    broken |= {"bmc.event_log.used", "bmc.reachable.answers"}
    assert {f"{c.name}.{m}" for c in catalogue() if c.family == "bmc" for m in c.demands} == broken


MALFORMED: list[tuple[str, dict[tuple[str, ...], Answer | None]]] = [
    ("bmc.event_log", {SEL: "Get SEL Info command failed\n"}),
    ("bmc.event_log", {SEL: Ran(1, "", "Unable to establish a session\n")}),
    ("bmc.sensors", {SDR: "FAN1 8400\n"}),
    ("bmc.sensors", {SDR: Ran(1, "", "Unable to open SDR for reading\n")}),
    ("bmc.sensors", {SDR: "\n"}),
]


@pytest.mark.parametrize(("name", "commands"), MALFORMED)
def test_an_answer_that_cannot_be_understood_is_never_a_pass(
    name: str, commands: dict[tuple[str, ...], Answer | None]
) -> None:
    assert record(name, server(commands=commands)).status is Status.ERROR


@pytest.mark.parametrize("name", CHECKS)
def test_a_machine_without_bmc_or_without_ipmitool_or_root_is_unsupported(name: str) -> None:
    assert "no /dev/ipmi0" in record(name, server({"/dev/ipmi0": None})).detail
    assert record(name, ReplayHost(files={"/dev/ipmi0": ""})).detail == "no such program: ipmitool"
    refused = Ran(1, "", NO_DEVICE)
    said = record(name, server(commands={SEL: refused, SDR: refused, INFO: refused}))
    assert said.status is Status.UNSUPPORTED
    assert "root" in said.detail
