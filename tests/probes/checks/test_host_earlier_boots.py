"""What earlier boots left in the kernel's log: what a restart cured no longer counts, the rest warns."""

from __future__ import annotations

import pytest

from probes.agent.api import Ran, Unsupported
from probes.catalogue import load_catalogue
from probes.checks import kernel_log
from probes.criteria import compile_rules, judge
from probes.model import Finding, Outcome, Status
from probes.profiles import load_profiles
from tests.probes.checks.server_node import BOOT, catalogue, judged, record, server, text, values
from tests.probes.replay import ReplayHost

UPTIME = 900.0
NOW = BOOT + UPTIME
JOURNAL = tuple(kernel_log.journal_command(24))
RING = "5,0,0,-;Linux version 6.8.0-generic (builder@example) #1 SMP\n"
THREE_BOOTS = text("host/journal-three-boots.txt")
LOCKUP = "watchdog: BUG: soft lockup - CPU#18 stuck for 27s! [python3:2254956]"
PANIC = "Kernel panic - not syncing: Fatal exception"
MARK = f"-- Boot {'d4' * 16} --\n"


def line(age: float, words: str) -> str:
    return f"{NOW - age:.6f} node001 kernel: {words}\n"


FIRST = line(UPTIME - 1, "Linux version 6.8.0-generic (builder@example) #1 SMP")


def node(journal: str | Ran, uptime: float = UPTIME, ring: str = RING) -> ReplayHost:
    """The server of the other tests, restarted fifteen minutes ago."""
    files: dict[str, str | None] = {
        "/proc/uptime": f"{uptime} 1.0\n",
        "/proc/stat": f"btime {round(NOW - uptime)}\n",
        "/dev/kmsg": ring,
    }
    return server(files, {JOURNAL: journal})


STRICT = load_profiles(load_catalogue()).find("cluster-node").demands
"""What a node of a cluster must show; stricter than the catalogue."""

BEFORE_BOOT = [
    ("host.kernel_faults.panic_before_boot", Outcome.WARN, None),
    ("host.machine_checks.uncorrected_before_boot", Outcome.WARN, None),
    ("host.pcie_events.fatal_before_boot", Outcome.WARN, "0000:18:00.0"),
    ("host.storage_events.io_errors_before_boot", Outcome.WARN, "sdb"),
]


@pytest.mark.parametrize(("metric", "outcome", "device"), BEFORE_BOOT)
def test_a_crash_or_broken_hardware_before_the_restart_warns_and_never_fails(
    metric: str, outcome: Outcome, device: str | None
) -> None:
    check, _, name = metric.rpartition(".")
    for rules in (compile_rules(catalogue()), compile_rules(catalogue(), [STRICT])):
        findings = judge(rules, check, record(check, node(THREE_BOOTS))).findings
        assert [(f.metric, f.outcome, f.device, f.value) for f in findings] == [(name, outcome, device, 1)]
        assert findings[0].reference
        assert findings[0].action


def test_what_a_restart_cures_does_not_count_any_more() -> None:
    faults = values("host.kernel_faults", node(THREE_BOOTS))
    cured = ("oops", "soft_lockup", "hung_task", "panic")
    assert {metric: faults[metric, None] for metric in cured} == dict.fromkeys(cured, 0)
    assert values("host.machine_checks", node(THREE_BOOTS))["thermal", None] == 0
    assert judged("host.oom", node(THREE_BOOTS)).outcome is Outcome.PASS


def test_the_same_line_in_this_boot_is_a_failure_of_this_boot_alone() -> None:
    ring = RING + f"1,1,{round((UPTIME - 60) * 1e6)},-;EDAC MC0: 1 UE memory read error on DIMM#0\n"
    findings = judged("host.machine_checks", node(FIRST, ring=ring)).findings
    assert [(f.metric, f.outcome) for f in findings] == [("uncorrected", Outcome.FAIL)]


def test_evidence_says_what_was_before_this_boot_and_shows_this_boot_first() -> None:
    ring = RING + f"1,1,{round((UPTIME - 60) * 1e6)},-;{LOCKUP}\n"
    shown = _warning("host.kernel_faults", node(THREE_BOOTS, ring=ring), "panic_before_boot").evidence
    assert shown == (f"1m00s ago: {LOCKUP}", f"50m00s ago, before this boot: {PANIC}")


def test_a_restart_in_order_after_the_panic_ends_its_warning() -> None:
    again = line(800, "systemd-journald[1]: Received SIGTERM") + MARK + line(400, "Linux version 6.8.0")
    ring = "5,0,0,-;Linux version 6.8.0\n"
    assert judged("host.kernel_faults", node(THREE_BOOTS + again, 401.0, ring)).outcome is Outcome.PASS
    # A DIMM is not mended by it.
    assert judged("host.machine_checks", node(THREE_BOOTS + again, 401.0, ring)).outcome is Outcome.WARN


@pytest.mark.parametrize("mark", [MARK, "-- Reboot --\n"], ids=["systemd 246 and later", "before"])
def test_boots_are_told_apart_by_their_id_whatever_the_clock_showed(mark: str) -> None:
    ahead = line(-3600, LOCKUP) + line(-3590, PANIC)
    found = values("host.kernel_faults", node(ahead + mark + FIRST))
    assert (found["soft_lockup", None], found["panic_before_boot", None]) == (0, 1)


def test_lines_of_this_boot_that_the_ring_lost_count_though_the_clock_was_behind_then() -> None:
    ring = f"5,9000,{round(800 * 1e6)},-;else\n"
    behind = (
        line(50_000, "Linux version 6.8.0") + line(49_990, LOCKUP) + line(90, "chronyd stepped the clock")
    )
    found = values("host.kernel_faults", node(line(60_000, PANIC) + MARK + behind, ring=ring))
    assert (found["soft_lockup", None], found["panic_before_boot", None]) == (1, 1)


def test_a_journal_that_has_nothing_of_this_boot_speaks_of_the_one_before() -> None:
    found = values("host.kernel_faults", node(line(3000, LOCKUP) + line(2990, PANIC)))
    assert (found["soft_lockup", None], found["panic_before_boot", None]) == (0, 1)


def test_what_nobody_kept_of_earlier_boots_is_not_called_zero() -> None:
    for journal in (FIRST, "-- No entries --\n", Ran(1, "", "No journal files were found.\n")):
        assert ("panic_before_boot", None) not in values("host.kernel_faults", node(journal))
    day = 86_400.0
    older = values("host.kernel_faults", node("-- No entries --\n", uptime=2 * day, ring=RING))
    assert older["panic_before_boot", None] == 0, "a boot that ended before the window says nothing in it"


def test_an_empty_journal_is_no_log_where_the_ring_may_not_be_read() -> None:
    host = server(
        {"/proc/uptime": "900.0 1.0\n", "/dev/kmsg": Unsupported("/dev/kmsg: Operation not permitted")},
        {("dmesg", "-r"): Ran(1, "", "Operation not permitted\n"), JOURNAL: "-- No entries --\n"},
    )
    assert record("host.kernel_faults", host).status is Status.UNSUPPORTED


def _warning(check: str, host: ReplayHost, metric: str) -> Finding:
    return next(finding for finding in judged(check, host).findings if finding.metric == metric)
