"""The host family on a healthy server, and on servers with one fault each."""

from __future__ import annotations

import pytest

from probes.agent.api import Ran, TimedOut
from probes.model import Outcome, Status
from tests.probes.checks.server_node import (
    AER,
    CPU,
    DECLARED,
    DOCKER,
    DOCKER_RUN,
    DPKG,
    EDAC,
    LIMITS,
    NODE,
    PCI,
    SYSTEMCTL,
    catalogue,
    judged,
    meminfo,
    psi,
    record,
    sched,
    server,
    text,
    values,
)
from tests.probes.replay import Answer

CHECKS = [check.name for check in catalogue() if check.family == "host"]
Commands = dict[tuple[str, ...], Answer | None]
FAIL, WARN = Outcome.FAIL, Outcome.WARN
CHRONY = ("chronyc", "-n", "tracking")
TRACKING = text("host/chronyc-tracking.txt")
THROTTLED = CPU + "/cpu0/thermal_throttle/package_throttle_total_time_ms"
ZOMBIES = {f"/proc/{n}/stat": f"{n} (x) Z 1 1 1 0 -1 4228044 0 0" for n in range(5000, 5100)}
DEVICE = f"{PCI}/0000:18:00.0"
FRAGMENTED = "Node 0, zone   Normal 9 9 9 9 9 9 9 9 3 2 4\n"
NO_DAEMON = Ran(1, "\n", "Cannot connect to the Docker daemon at unix:///run/docker.sock.\n")
NO_IMAGE = Ran(125, "", "docker: Error response: no such image\n")
NO_PACKAGE = Ran(1, "", "no packages found matching example-driver\n")
SLURMD = "slurmd.service loaded failed failed Slurm node daemon\n"
NO_SYSTEMD = Ran(1, "", "System has not been booted with systemd as init system (PID 1). Can't operate.\n")


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_on_a_healthy_server(name: str) -> None:
    result = judged(name, server(params=DECLARED.get(name)))
    assert result.outcome is Outcome.PASS, result.findings


FILE_FAULTS: list[tuple[str, Outcome, dict[str, str | None]]] = [
    ("host.cpu.offline", WARN, {CPU + "/online": "0-6\n"}),
    (
        "host.microcode.distinct",
        WARN,
        {"/proc/cpuinfo": "microcode : 0x1\n\nmicrocode : 0x2\n"},
    ),
    (
        "host.throttling.share",
        WARN,
        {THROTTLED: "9000000\n"},
    ),
    (
        "host.throttling.share",
        FAIL,
        {THROTTLED: "90000000\n"},
    ),
    ("host.memory.available_share", WARN, {"/proc/meminfo": meminfo(available=5_000_000)}),
    ("host.memory.corrupted", FAIL, {"/proc/meminfo": meminfo(corrupted=4)}),
    (
        "host.fragmentation.large_blocks",
        WARN,
        {"/proc/buddyinfo": FRAGMENTED},
    ),
    (
        "host.clock_source.current",
        WARN,
        {"/sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n"},
    ),
    ("host.taint.machine_check", FAIL, {"/proc/sys/kernel/tainted": "16\n"}),
    ("host.taint.bad_page", FAIL, {"/proc/sys/kernel/tainted": "32\n"}),
    ("host.taint.died", FAIL, {"/proc/sys/kernel/tainted": "12416\n"}),
    ("host.taint.soft_lockup", WARN, {"/proc/sys/kernel/tainted": "16384\n"}),
    ("host.taint.crash_records", WARN, {"/sys/fs/pstore/dmesg-erst-7": "Panic#1 Part1\n"}),
    ("host.edac.uncorrected", FAIL, {EDAC + "/ue_count": "1\n"}),
    ("host.edac.corrected_per_day", WARN, {EDAC + "/ce_count": "150\n"}),
    ("host.edac.corrected_per_day", FAIL, {EDAC + "/ce_count": "15000\n"}),
    ("host.pcie_aer.fatal", FAIL, {DEVICE + "/aer_dev_fatal": "DLP 1\nTOTAL_ERR_FATAL 1\n"}),
    (
        "host.pcie_aer.nonfatal",
        WARN,
        {DEVICE + "/aer_dev_nonfatal": AER + "CmpltTO 1\nUnsupReq 2\n"},
    ),
    (
        "host.pcie_aer.correctable_per_hour",
        WARN,
        {DEVICE + "/aer_dev_correctable": "RxErr 90000\n"},
    ),
    ("host.handles.open_files_share", WARN, {"/proc/sys/fs/file-nr": "85\t0\t100\n"}),
    ("host.handles.open_files_share", FAIL, {"/proc/sys/fs/file-nr": "96\t0\t100\n"}),
    ("host.handles.threads_share", WARN, {"/proc/sys/kernel/pid_max": "1800\n"}),
    ("host.handles.threads_share", FAIL, {"/proc/sys/kernel/threads-max": "1501\n"}),
    (
        "host.processes.zombies",
        WARN,
        {f"/proc/{n}/stat": f"{n} (x) Z 1 1 1 0 -1 4228044 0 0" for n in range(5000, 5100)},
    ),
    ("host.processes.stuck", WARN, {"/proc/4242/sched": sched(301)}),
    (
        "host.processes.stuck",
        FAIL,
        {
            f"/proc/{n}/{file}": content
            for n in range(6000, 6005)
            for file, content in (("stat", f"{n} (python) D 1 1 1 0 -1 4194304 0 0"), ("sched", sched(900)))
        },
    ),
    ("host.pressure.memory_full", WARN, {"/proc/pressure/memory": psi(22.5)}),
    ("host.limits.open_files", WARN, {"/proc/self/limits": LIMITS.replace("1048576", "1024")}),
]


@pytest.mark.parametrize(
    ("metric", "outcome", "files"), FILE_FAULTS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_a_fault_in_a_kernel_file_is_seen(
    metric: str, outcome: Outcome, files: dict[str, str | None]
) -> None:
    check = metric.rpartition(".")[0]
    _is_blamed(judged(check, server(files, params=DECLARED.get(check))).findings, metric, outcome)


COMMAND_FAULTS: list[tuple[str, Outcome, Commands]] = [
    ("host.time_sync.synchronised", WARN, {CHRONY: TRACKING.replace("Normal", "Not synchronised")}),
    ("host.time_sync.offset", WARN, {CHRONY: TRACKING.replace("0.000006523", "0.250000000")}),
    ("host.time_sync.offset", FAIL, {CHRONY: TRACKING.replace("0.000006523", "7200.5")}),
    (
        "host.services.important_failed",
        FAIL,
        {SYSTEMCTL: SLURMD},
    ),
    (
        "host.containers.answers",
        WARN,
        {DOCKER: NO_DAEMON},
    ),
    ("host.containers.answers", WARN, {DOCKER: TimedOut("8 s")}),
    (
        "host.container_start.exit_status",
        FAIL,
        {DOCKER_RUN: NO_IMAGE},
    ),
    (
        "host.packages.missing",
        FAIL,
        {(*DPKG, "example-driver"): NO_PACKAGE},
    ),
    ("host.packages.missing", FAIL, {(*DPKG, "example-driver"): "rc  example-driver 550.54-0ubuntu1\n"}),
    ("host.packages.different", FAIL, {(*DPKG, "example-driver"): "ii  example-driver 545.23-1\n"}),
]


@pytest.mark.parametrize(
    ("metric", "outcome", "commands"), COMMAND_FAULTS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
def test_a_fault_that_a_tool_reports_is_seen(metric: str, outcome: Outcome, commands: Commands) -> None:
    check = metric.rpartition(".")[0]
    _is_blamed(judged(check, server(commands=commands, params=DECLARED.get(check))).findings, metric, outcome)


DECLARED_FAULTS: list[tuple[str, dict[str, object]]] = [
    ("host.kernel_options.missing", {"required": ["iommu=pt", "pci=realloc=off"]}),
    ("host.kernel_options.forbidden", {"forbidden": ["quiet"]}),
    ("host.modules.missing", {"required": ["nvidia_peermem"]}),
    ("host.modules.forbidden", {"forbidden": ["mlx5-core"]}),
    ("host.containers.missing", {"required": ["podman"]}),
]


@pytest.mark.parametrize(("metric", "params"), DECLARED_FAULTS)
def test_what_the_inventory_declares_and_the_node_lacks_is_a_failure(
    metric: str, params: dict[str, object]
) -> None:
    _is_blamed(judged(metric.rpartition(".")[0], server(params=params)).findings, metric, FAIL)


def test_a_declared_unit_that_is_not_active_is_a_failure() -> None:
    host = server(
        commands={("systemctl", "is-active", "--", "slurmd", "sshd"): Ran(3, "inactive\nactive\n", "")},
        params={"active": ["slurmd", "sshd"]},
    )
    result = judged("host.services", host)
    _is_blamed(result.findings, "host.services.inactive", FAIL)
    assert "slurmd is inactive" in result.findings[0].evidence


def test_every_limit_of_the_family_has_a_fault_here_or_in_the_kernel_logs_tests() -> None:
    from tests.probes.checks.test_host_earlier_boots import BEFORE_BOOT
    from tests.probes.checks.test_host_kernel_log import EVENTS

    faults = (*FILE_FAULTS, *COMMAND_FAULTS, *DECLARED_FAULTS, *EVENTS, *BEFORE_BOOT)
    broken = {metric for metric, *_ in faults} | {"host.services.inactive"}
    limited = {
        f"{check.name}.{metric}"
        for check in catalogue()
        if check.family == "host"
        for metric in check.demands
    }
    assert limited == broken


def _is_blamed(findings: object, metric: str, outcome: Outcome) -> None:
    assert isinstance(findings, tuple)
    named = {(f"{f.check}.{f.metric}", f.outcome) for f in findings}
    assert (metric, outcome) in named, findings
    for finding in findings:
        assert finding.limit
        assert finding.reference
        assert finding.action


MALFORMED: list[tuple[str, dict[str, str | None], Commands]] = [
    ("host.cpu", {"/proc/cpuinfo": "nonsense\n", CPU + "/online": None}, {}),
    ("host.throttling", {CPU + "/cpu0/thermal_throttle/core_throttle_count": "many\n"}, {}),
    ("host.memory", {"/proc/meminfo": "MemTotal: lots\n"}, {}),
    ("host.numa", {NODE + "/node0/meminfo": "\n"}, {}),
    ("host.swap", {"/proc/swaps": "nothing here\n"}, {}),
    ("host.swap", {"/proc/swaps": "Filename\tType\n/dev/sda2 partition lots 0 -2\n"}, {}),
    ("host.fragmentation", {"/proc/buddyinfo": "Node 0, zone Normal a b c\n"}, {}),
    ("host.kernel_faults", {"/dev/kmsg": "login: root\n"}, {}),
    ("host.taint", {"/proc/sys/kernel/tainted": "yes\n"}, {}),
    ("host.edac", {EDAC + "/ue_count": "none\n"}, {}),
    ("host.pcie_aer", {DEVICE + "/aer_dev_fatal": "DLP one\n"}, {}),
    ("host.handles", {"/proc/sys/fs/file-nr": "1 2\n"}, {}),
    ("host.handles", {"/proc/loadavg": "0 0 0\n"}, {}),
    ("host.processes", {"/proc/1/stat": "1 systemd S\n"}, {}),
    ("host.pressure", {"/proc/pressure/memory": "calm\n"}, {}),
    ("host.pressure", {"/proc/loadavg": "\n"}, {}),
    ("host.limits", {"/proc/self/limits": "Limit Soft Hard\n"}, {}),
    ("host.time_sync", {}, {CHRONY: "Reference ID    : 0\n"}),
    ("host.packages", {}, {(*DPKG, "example-driver"): "ii\n"}),
    ("host.uptime", {"/proc/uptime": ""}, {}),
]


@pytest.mark.parametrize(("name", "files", "commands"), MALFORMED)
def test_an_answer_that_cannot_be_understood_is_never_a_pass(
    name: str, files: dict[str, str | None], commands: Commands
) -> None:
    host = server(files, commands, DECLARED.get(name))
    assert record(name, host).status is Status.ERROR
    assert judged(name, server(files, commands, DECLARED.get(name))).outcome is Outcome.UNKNOWN


ANSWERS_ANYWHERE = {"host.iommu", "host.modules", "host.packages"}
"""An empty machine has no IOMMU groups, no modules and no declared packages, and that is their answer."""


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ANSWERS_ANYWHERE])
def test_a_machine_without_the_files_and_tools_is_unsupported_with_a_reason(name: str) -> None:
    from tests.probes.replay import ReplayHost

    said = record(name, ReplayHost())
    assert said.status is Status.UNSUPPORTED
    assert said.detail


def test_a_tool_that_hangs_is_a_time_out_of_its_check() -> None:
    hung: Commands = {
        CHRONY: TimedOut("chronyc did not answer"),
        DOCKER_RUN: TimedOut("docker did not answer"),
    }
    assert record("host.time_sync", server(commands=hung)).status is Status.TIMEOUT
    rm = (*DOCKER_RUN[:1], "rm", "-f", DOCKER_RUN[6])
    host = server(commands={**hung, rm: ""}, params={"image": "example"})
    assert record("host.container_start", host).status is Status.TIMEOUT
    assert host.asked[-1] == rm  # nothing stays behind


def test_cpus_are_counted_by_socket_core_and_thread() -> None:
    found = values("host.cpu", server())
    assert (found["sockets", None], found["cores", None], found["threads", None]) == (2, 4, 8)


def test_siblings_that_are_offline_because_smt_is_off_are_no_fault() -> None:
    files = {CPU + "/online": "0-3\n", CPU + "/smt/control": "off\n"}
    assert values("host.cpu", server(files))["offline", None] == 0


def test_empty_memory_slots_are_counted_and_named() -> None:
    host = server()
    found = values("host.dimms", host)
    assert (found["slots", None], found["populated", None], found["sizes", None]) == (3, 2, "64 GB")
    assert host.evidence == ["empty slots: DIMM_A2"]


@pytest.mark.parametrize("field", ["Configured Memory Speed", "Configured Clock Speed"])
def test_a_memory_module_without_a_part_number_has_none_and_not_its_speed(field: str) -> None:
    text = (
        "# dmidecode 3.3\n\n"
        f"Memory Device\n\tSize: 64 GB\n\tLocator: A1\n\t{field}: 4800 MT/s\n\n"
        f"Memory Device\n\tSize: 64 GB\n\tLocator: B1\n\tPart Number: EXAMPLE\n\t{field}: 4800 MT/s\n"
    ).replace("Memory Device\n\tSize", "Handle 0x0024, DMI type 17, 92 bytes\nMemory Device\n\tSize")
    host = server(commands={("dmidecode", "-t", "17"): text})
    found = values("host.dimms", host)
    assert (found["parts", None], found["speeds", None]) == ("EXAMPLE", "4800 MT/s")
    assert host.evidence == ["parts differ: none, EXAMPLE"]


def test_dmidecode_without_root_is_unsupported() -> None:
    refused = Ran(1, "# dmidecode 3.3\n", "/sys/firmware/dmi/tables/smbios_entry_point: Permission denied\n")
    said = record("host.dimms", server(commands={("dmidecode", "-t", "17"): refused}))
    assert said.status is Status.UNSUPPORTED
    assert "Permission denied" in said.detail


def test_memory_without_cpus_does_not_unbalance_the_numa_nodes() -> None:
    files = {NODE + "/node2/meminfo": "Node 2 MemTotal: 16000000 kB\n", NODE + "/node2/cpulist": "\n"}
    found = values("host.numa", server(files))
    assert (found["nodes", None], found["nodes_with_cpus", None]) == (3, 2)
    assert found["memory_balance", None] == round(65 / 66, 4)


def test_swap_in_use_is_summed_over_its_areas() -> None:
    areas = (
        "Filename\tType\tSize\tUsed\tPriority\n/swap.img file 1000 10 -2\n/dev/sdb2 partition 2000 20 -3\n"
    )
    found = values("host.swap", server({"/proc/swaps": areas}))
    assert (found["total", None], found["used", None]) == (3000 * 1024, 30 * 1024)


def test_a_kernel_thread_that_sleeps_uninterruptibly_is_no_stuck_process() -> None:
    found = values("host.processes", server())
    assert (found["uninterruptible", None], found["stuck", None], found["longest_wait", None]) == (1, 0, 2.0)


def test_a_process_of_any_name_is_read_to_its_state() -> None:
    host = server({"/proc/4242/sched": sched(400)})
    assert judged("host.processes", host).outcome is WARN
    assert any("my (odd) job" in line for line in host.evidence)


def test_ntpd_and_systemd_are_asked_where_chrony_is_not_there() -> None:
    no_chrony: Commands = {CHRONY: None}
    ntpd: Commands = {**no_chrony, ("ntpq", "-n", "-p"): text("host/ntpq-pn.txt")}
    found = values("host.time_sync", server(commands=ntpd))
    assert (found["daemon", None], found["offset", None], found["stratum", None]) == ("ntpd", 0.0025, 2)
    systemd: Commands = {
        **no_chrony,
        ("timedatectl",): text("host/timedatectl.txt"),
        ("timedatectl", "timesync-status"): text("host/timedatectl-timesync-status.txt"),
    }
    found = values("host.time_sync", server(commands=systemd))
    assert (found["daemon", None], found["offset", None], found["synchronised", None]) == (
        "systemd",
        0.0015,
        True,
    )


def test_ntpd_without_a_chosen_peer_is_not_synchronised() -> None:
    lost = text("host/ntpq-pn.txt").replace("*192", " 192")
    found = values("host.time_sync", server(commands={CHRONY: None, ("ntpq", "-n", "-p"): lost}))
    assert found["synchronised", None] is False


def test_a_daemon_that_does_not_answer_is_said_in_the_reason() -> None:
    dead: Commands = {CHRONY: Ran(1, "506 Cannot talk to daemon\n", "")}
    assert "506 Cannot talk to daemon" in record("host.time_sync", server(commands=dead)).detail


def test_a_container_without_systemd_is_unsupported_and_not_failed() -> None:
    said = record("host.services", server(commands={SYSTEMCTL: NO_SYSTEMD}))
    assert said.status is Status.UNSUPPORTED
    assert "not been booted with systemd" in said.detail


def test_failed_units_that_no_job_needs_do_not_condemn_the_node() -> None:
    failed: Commands = {SYSTEMCTL: "motd-news.service loaded failed failed Message of the Day\n"}
    host = server(commands=failed)
    assert judged("host.services", host).outcome is Outcome.PASS
    assert host.evidence == ["failed: motd-news.service"]


def test_a_client_without_its_daemon_is_no_runtime() -> None:
    assert record("host.containers", server({"/run/docker.sock": None})).status is Status.UNSUPPORTED


def test_rpm_machines_are_asked_with_rpm() -> None:
    query = ("rpm", "-q", "--qf", "%{NAME} %{VERSION}-%{RELEASE}\\n", "absent", "example-driver")
    answer = Ran(1, "package absent is not installed\nexample-driver 550.54-1.el9\n", "")
    host = server(
        commands={(*DPKG, "example-driver"): None, query: answer},
        params={"packages": {"example-driver": "550.54", "absent": None}},
    )
    found = values("host.packages", host)
    assert (found["missing", None], found["different", None]) == (1, 0)


def test_bridges_that_redirect_peer_traffic_are_named() -> None:
    on = text("host/lspci-vvv.txt").replace("SrcValid- TransBlk- ReqRedir-", "SrcValid+ TransBlk- ReqRedir+")
    host = server(commands={("lspci", "-vvv"): on})
    assert values("host.iommu", host)["redirecting_bridges", None] == 1
    assert host.evidence == ["ACS request redirect is on: 16:00.0"]


def test_access_control_that_only_root_may_read_is_left_open() -> None:
    hidden = "16:00.0 PCI bridge: Example\n\tCapabilities: <access denied>\n"
    assert ("redirecting_bridges", None) not in values(
        "host.iommu", server(commands={("lspci", "-vvv"): hidden})
    )


def test_words_of_the_kernel_line_that_name_this_machines_disk_are_left_out() -> None:
    assert values("host.versions", server())["options", None] == "ro iommu=pt quiet"


def test_enumeration_errors_of_pci_do_not_count_but_others_name_their_device() -> None:
    files = {DEVICE + "/aer_dev_nonfatal": AER + "PoisonTLP 2\nUnsupReq 9\n"}
    assert values("host.pcie_aer", server(files))["nonfatal", "0000:18:00.0"] == 2


def test_a_dimm_with_errors_is_named() -> None:
    host = server({EDAC + "/dimm0/dimm_ue_count": "1\n"})
    record("host.edac", host)
    assert host.evidence == ["mc0 CPU_SrcID#0_MC#0_Chan#0_DIMM#0: uncorrected 1, corrected 4"]


def test_a_daemon_that_follows_its_own_clock_is_not_synchronised() -> None:
    alone: Commands = {CHRONY: text("host/chronyc-tracking-local.txt")}
    assert values("host.time_sync", server(commands=alone))["synchronised", None] is False
