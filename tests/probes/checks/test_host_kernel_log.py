"""Events in the kernel's log: every kind by lines that kernels print, the window, and the ways to the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from probes.agent.api import Ran, TimedOut, Unsupported
from probes.checks import kernel_log
from probes.model import Outcome, Status
from tests.probes.checks.server_node import BOOT, UPTIME, judged, kmsg, record, server, text, values
from tests.probes.replay import ReplayHost

FAIL, WARN = Outcome.FAIL, Outcome.WARN
EVENTS: list[tuple[str, Outcome, str, str | None, int]] = [
    (event["metric"], Outcome(event["outcome"]), event["line"], event["device"], event["times"])
    for event in yaml.safe_load(text("host/kernel-events.yaml"))["events"]
]


@pytest.mark.parametrize(("metric", "outcome", "line", "device", "times"), EVENTS)
def test_lines_that_kernels_print_are_counted_under_their_kind(
    metric: str, outcome: Outcome, line: str, device: str | None, times: int
) -> None:
    check, _, name = metric.rpartition(".")
    result = judged(check, server({"/dev/kmsg": kmsg(*[(60.0 + n, line) for n in range(times)][::-1])}))
    found = {f.metric: f for f in result.findings}
    assert (found[name].outcome, found[name].device, found[name].value) == (outcome, device, times)
    assert set(found) == {name}
    assert any(line in evidence for evidence in found[name].evidence)


HARMLESS = [
    "EXT4-fs (vda): mounted filesystem r/w without journal. Quota mode: none.",
    "mce: CPU0: Thermal monitoring enabled (TM1)",
    "EDAC MC: Ver: 3.0.0",
    "EDAC MC0: Giving out device to module skx_edac controller Skylake Socket#0 IMC#0",
    "pcieport 0000:16:01.0: AER: enabled with IRQ 29",
    "Memory cgroup out of memory: Killed process 31234 (python3) total-vm:1kB, anon-rss:1kB",
    "I/O error, dev fd0, sector 0 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 0",
    "blk_update_request: I/O error, dev sr0, sector 0",
    "rcu: Hierarchical RCU implementation.",
    "NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.",
    "nvme nvme0: 8/0/0 default/read/poll queues",
    "thermal_sys: Registered thermal governor 'step_wise'",
    "RAS: Correctable Errors collector initialized.",
    "ACPI: thermal: Thermal Zone [TZ00] (41 C)",
    "MCE: In-kernel MCE decoding enabled.",
]
CHECKS = sorted({metric.rpartition(".")[0] for metric, *_ in EVENTS})


@pytest.mark.parametrize("name", CHECKS)
def test_what_healthy_kernels_print_is_no_event(name: str) -> None:
    log = kmsg(*((900.0 - n, line) for n, line in enumerate(HARMLESS)))
    assert judged(name, server({"/dev/kmsg": log})).outcome is Outcome.PASS


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("file", ["kmsg.1.log", "kmsg.2.peermem.log"])
def test_logs_of_real_machines_without_such_faults_show_none(captures: Path, name: str, file: str) -> None:
    log = (captures / "captures/kernel" / file).read_text()
    host = server({"/dev/kmsg": log, "/proc/uptime": "9200.0 1.0\n"})
    assert judged(name, host).outcome is Outcome.PASS


def test_a_cgroups_own_limit_is_a_fact_and_no_fault() -> None:
    log = kmsg((60, "Memory cgroup out of memory: Killed process 31234 (python3) total-vm:1kB"))
    found = values("host.oom", server({"/dev/kmsg": log}))
    assert (found["machine", None], found["cgroup", None]) == (0, 1)


PANIC = "Kernel panic - not syncing: Fatal exception"
OOPS = "Oops: 0000 [#1] SMP"
JOURNAL = tuple(kernel_log.journal_command(24))
NOW = BOOT + UPTIME


def test_an_event_before_the_window_does_not_count() -> None:
    day = 86_400
    inside = values("host.kernel_faults", server({"/dev/kmsg": kmsg((day - 60, OOPS))}))
    outside = values("host.kernel_faults", server({"/dev/kmsg": kmsg((day + 60, OOPS))}))
    assert (inside["oops", None], outside["oops", None]) == (1, 0)


def test_the_window_is_a_parameter() -> None:
    host = server({"/dev/kmsg": kmsg((86_400 + 60, OOPS))}, params={"window_hours": 48})
    assert values("host.kernel_faults", host)["oops", None] == 1


def test_the_journal_is_not_asked_again_for_what_a_whole_ring_buffer_has() -> None:
    uptime = 900.0
    now = BOOT + uptime
    before, since = f"{now - 3000:.6f} node001 kernel: {PANIC}\n", f"{now - 890:.6f} node001 kernel: {OOPS}\n"
    host = server(
        files={"/proc/uptime": f"{uptime} 1.0\n", "/dev/kmsg": "5,0,0,-;Linux version 6.8.0\n"},
        commands={JOURNAL: f"{before}-- Boot {'b2' * 16} --\n{since}"},
    )
    found = values("host.kernel_faults", host)
    # The oops is of this boot, whose ring buffer is whole and does not have it.
    assert (found["panic_before_boot", None], found["oops", None]) == (1, 0)
    assert found["log_hours", None] == round(3000 / 3600, 2)


def test_the_ring_buffer_alone_says_how_far_back_it_reaches() -> None:
    rotated = kmsg((7200, "something"), (60, "else")).split("\n", 1)[1]
    assert values("host.kernel_faults", server({"/dev/kmsg": rotated}))["log_hours", None] == 2.0


def test_a_journal_that_hangs_leaves_the_ring_buffer() -> None:
    rotated = kmsg((7200, OOPS)).split("\n", 1)[1]
    host = server({"/dev/kmsg": rotated}, {JOURNAL: TimedOut("journalctl: 10 s")})
    assert values("host.kernel_faults", host)["oops", None] == 1
    assert any("journalctl did not answer" in line for line in host.evidence)


def test_dmesg_is_asked_where_the_device_may_not_be_read() -> None:
    raw = f"<5>[    0.000000] Linux version 6.8.0\n<1>[{UPTIME - 60:.6f}][  T311] {OOPS}\n"
    host = server({"/dev/kmsg": Unsupported("/dev/kmsg: Operation not permitted")}, {("dmesg", "-r"): raw})
    assert values("host.kernel_faults", host)["oops", None] == 1


def test_a_log_that_nobody_may_read_is_unsupported_and_says_what_to_do() -> None:
    host = server(
        {"/dev/kmsg": None},
        {
            ("dmesg", "-r"): Ran(1, "", "dmesg: read kernel buffer failed: Operation not permitted\n"),
            JOURNAL: Ran(1, "", "No journal files were opened due to insufficient permissions.\n"),
        },
    )
    said = record("host.kernel_faults", host)
    assert said.status is Status.UNSUPPORTED
    assert "root" in said.detail


def test_nothing_is_cleared_and_nothing_waits() -> None:
    host = server({"/dev/kmsg": kmsg((60, OOPS)).split("\n", 1)[1]}, {JOURNAL: ""})
    record("host.kernel_faults", host)
    words = {word for argv in host.asked for word in argv}
    assert not words & {"-C", "-c", "--clear", "--read-clear", "-w", "--follow", "-f", "--vacuum-time"}


def test_an_event_is_never_in_the_future_of_a_container_that_counts_its_own_uptime() -> None:
    lines = kernel_log.parse_ring("[  500.000000] a\n[  900.000000] b\n", uptime=30.0)
    assert [line.age for line in lines] == [400.0, 0.0]


def test_real_dmesg_with_human_times_is_refused_and_not_misread(captures: Path) -> None:
    log = (captures / "captures/kernel/dmesg-xid-119.log").read_text()
    with pytest.raises(ValueError, match="expected"):
        kernel_log.parse_ring(log, 1000.0)


def test_patterns_that_do_not_compile_are_an_error_of_the_check() -> None:
    host = server(params={"events": {"oops": ["("]}})
    assert record("host.kernel_faults", host).status is Status.ERROR


def test_this_machines_own_log_can_be_read_or_says_why_not() -> None:
    from probes.agent.host import Machine

    try:
        lines = kernel_log.read(Machine(), 24).lines
    except Unsupported as reason:
        said = str(reason)
    else:
        said = "probe as root" if all(line.age >= 0 for line in lines) else "an event in the future"
    assert "probe as root" in said


def test_an_empty_replay_has_no_log() -> None:
    assert (
        record("host.kernel_faults", ReplayHost(files={"/proc/uptime": "1 1"})).status is Status.UNSUPPORTED
    )
