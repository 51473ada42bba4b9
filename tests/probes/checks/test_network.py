"""The network family on a healthy server, and on servers with one fault each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from probes.agent.api import Ran, TimedOut
from probes.checks import ethtool, kernel_log, network
from probes.model import Outcome, Status
from tests.probes.checks.server_node import (
    ARP,
    DECLARED,
    NET,
    RDMA,
    ROUTE,
    UPTIME,
    catalogue,
    judged,
    kmsg,
    record,
    server,
    text,
    values,
)
from tests.probes.replay import Answer, ReplayHost

FAIL, WARN = Outcome.FAIL, Outcome.WARN
CHECKS = [check.name for check in catalogue() if check.family == "network"]
# Every check whose answer is not that of an absent device.
ON_THE_SERVER = [name for name in CHECKS if name != "network.loopback"]
BOND = text("network/bond0.txt")
MODULE = text("network/ethtool-module.txt")
PORT = f"{RDMA}/mlx5_1/ports/1"
SNMP = "Tcp: InSegs OutSegs RetransSegs\nTcp: 9 {} {}\n"
GETENT = ("getent", "ahosts", "node001")


@pytest.mark.parametrize("name", ON_THE_SERVER)
def test_every_check_passes_on_a_healthy_server(name: str) -> None:
    result = judged(name, server(params=DECLARED.get(name)))
    assert result.outcome is Outcome.PASS, result.findings


FAULTS: list[tuple[str, Outcome, str | None, dict[str, str | None]]] = [
    (
        "network.interfaces.up",
        FAIL,
        None,
        {f"{NET}/ens1f0/operstate": "down\n", f"{NET}/ens1f1/operstate": "down\n"},
    ),
    ("network.interfaces.expected_down", FAIL, None, {f"{NET}/ens1f1/operstate": "down\n"}),
    ("network.interfaces.duplex", WARN, "ens1f0", {f"{NET}/ens1f0/duplex": "half\n"}),
    (
        "network.interface_errors.error_share",
        WARN,
        "ens1f0",
        {f"{NET}/ens1f0/statistics/rx_errors": "9000\n"},
    ),
    (
        "network.interface_errors.error_share",
        FAIL,
        "ens1f0",
        {f"{NET}/ens1f0/statistics/tx_errors": "90000\n"},
    ),
    (
        "network.interface_errors.drop_share",
        WARN,
        "ens1f1",
        {f"{NET}/ens1f1/statistics/rx_missed_errors": "9000000\n"},
    ),
    ("network.carrier.losses_per_day", WARN, "ens1f1", {f"{NET}/ens1f1/carrier_down_count": "51\n"}),
    ("network.bonds.up", FAIL, "bond0", {"/proc/net/bonding/bond0": BOND.replace("up", "down", 1)}),
    (
        "network.bonds.members",
        FAIL,
        "bond0",
        {"/proc/net/bonding/bond0": BOND.partition("Slave Interface")[0]},
    ),
    (
        "network.bonds.members_down",
        WARN,
        "bond0",
        {"/proc/net/bonding/bond0": BOND.replace("ens1f1\nMII Status: up", "ens1f1\nMII Status: down")},
    ),
    (
        "network.bonds.split",
        WARN,
        "bond0",
        {"/proc/net/bonding/bond0": BOND[: BOND.rindex("1")] + "2\n"},
    ),
    ("network.rdma_ports.stuck", FAIL, None, {PORT + "/state": "2: INIT\n"}),
    (
        "network.rdma_ports.down",
        WARN,
        None,
        {PORT + "/state": "1: DOWN\n", PORT + "/phys_state": "2: Polling\n"},
    ),
    ("network.rdma_errors.error_share", WARN, "mlx5_1:1", {PORT + "/counters/port_rcv_errors": "30000\n"}),
    ("network.rdma_errors.error_share", FAIL, "mlx5_1:1", {PORT + "/counters/symbol_error": "30000000\n"}),
    ("network.routes.default_routes", WARN, None, {"/proc/net/route": ROUTE}),
    (
        "network.neighbours.share",
        WARN,
        "ipv4",
        {"/proc/net/stat/arp_cache": ARP.replace("00000010", "00000340")},
    ),
    ("network.neighbours.share", FAIL, "ipv4", {"/proc/sys/net/ipv4/neigh/default/gc_thresh3": "16\n"}),
    (
        "network.neighbours.overflows",
        WARN,
        "ipv4",
        {"/proc/net/stat/arp_cache": ARP.replace("00000020 00000000", "00000020 0000000a")},
    ),
    ("network.conntrack.share", WARN, None, {"/proc/sys/net/netfilter/nf_conntrack_count": "220000\n"}),
    ("network.conntrack.share", FAIL, None, {"/proc/sys/net/netfilter/nf_conntrack_count": "262144\n"}),
    ("network.tcp.retransmitted_share", WARN, None, {"/proc/net/snmp": SNMP.format(100_000, 13_000)}),
    ("network.settings.different", FAIL, None, {"/proc/sys/net/core/rmem_max": "212992\n"}),
]
COMMAND_FAULTS: list[tuple[str, Outcome, str | None, dict[tuple[str, ...], Answer | None]]] = [
    (
        "network.optics.alarms",
        WARN,
        "ens1f0",
        {
            ("ethtool", "-m", "ens1f0"): MODULE.replace(
                "low alarm    (Channel 1)   : Off", "low alarm (Channel 1) : On"
            )
        },
    ),
    ("network.dns.own_name", WARN, None, {GETENT: Ran(2, "", "")}),
    ("network.dns.own_name", WARN, None, {GETENT: TimedOut("getent: 5 s")}),
]


@pytest.mark.parametrize(("metric", "outcome", "device", "files"), FAULTS)
def test_a_fault_in_a_kernel_file_is_seen(
    metric: str, outcome: Outcome, device: str | None, files: dict[str, str | None]
) -> None:
    check = metric.rpartition(".")[0]
    _is_blamed(check, server(files, params=DECLARED.get(check)), metric, outcome, device)


@pytest.mark.parametrize(("metric", "outcome", "device", "commands"), COMMAND_FAULTS)
def test_a_fault_that_a_tool_reports_is_seen(
    metric: str, outcome: Outcome, device: str | None, commands: dict[tuple[str, ...], Answer | None]
) -> None:
    check = metric.rpartition(".")[0]
    _is_blamed(check, server(commands=commands), metric, outcome, device)


def _is_blamed(check: str, host: ReplayHost, metric: str, outcome: Outcome, device: str | None) -> None:
    findings = judged(check, host).findings
    assert (metric, outcome, device) in {(f"{f.check}.{f.metric}", f.outcome, f.device) for f in findings}, (
        findings
    )
    assert all(f.limit and f.reference and f.action for f in findings)


FLAP = ("mlx5_core 0000:5c:00.0 ens1f0: Link down", "mlx5_core 0000:5c:00.0 ens1f0: Link up")


@pytest.mark.parametrize(("state", "down"), [("up", 0), ("down", 1)])
def test_a_bond_can_be_expected_up_though_it_has_no_hardware_of_its_own(state: str, down: int) -> None:
    files = {f"{NET}/bond0/operstate": state + "\n"}
    host = server(files=files, params={"expect_up": ["bond0", "ens1f*"]})
    assert values("network.interfaces", host)["expected_down", None] == down


def flaps(times: int, first: float = 40_000.0) -> str:
    return kmsg(*((first - 60.0 * i, FLAP[i % 2]) for i in range(2 * times)))


def test_three_recoveries_in_twelve_hours_are_flapping() -> None:
    assert judged("network.link_flaps", server({"/dev/kmsg": flaps(2)})).outcome is Outcome.PASS
    _is_blamed(
        "network.link_flaps",
        server({"/dev/kmsg": flaps(3)}),
        "network.link_flaps.recoveries_12h",
        FAIL,
        "ens1f0",
    )


def test_five_recoveries_in_a_day_are_flapping_though_half_a_day_has_few() -> None:
    spread = kmsg(
        *((age - 10 * up, FLAP[up]) for age in (80_000, 70_000, 60_000, 50_000, 9_000) for up in (0, 1))
    )
    found = values("network.link_flaps", server({"/dev/kmsg": spread}))
    assert (found["recoveries_12h", "ens1f0"], found["recoveries_24h", "ens1f0"]) == (1, 5)
    _is_blamed(
        "network.link_flaps",
        server({"/dev/kmsg": spread}),
        "network.link_flaps.recoveries_24h",
        FAIL,
        "ens1f0",
    )


DIALECTS = [
    ("ixgbe 0000:01:00.0 eth0: NIC Link is Down", "ixgbe 0000:01:00.0 eth0: NIC Link is Up 10 Gbps"),
    ("e1000e: eth0 NIC Link is Down", "e1000e: eth0 NIC Link is Up 1000 Mbps Full Duplex"),
    ("igb 0000:01:00.0 eth0: igb: eth0 NIC Link is Down", "igb 0000:01:00.0 eth0: igb: eth0 NIC Link is Up"),
    ("bnxt_en 0000:19:00.0 eth0: NIC Link is Down", "bnxt_en 0000:19:00.0 eth0: NIC Link is Up, 25000 Mbps"),
    ("tg3 0000:02:00.0 eth0: Link is down", "tg3 0000:02:00.0 eth0: Link is up at 1000 Mbps, full duplex"),
    ("r8169 0000:03:00.0 eth0: Link is Down", "r8169 0000:03:00.0 eth0: Link is Up - 1Gbps/Full"),
    ("mlx5_core 0000:5c:00.0 eth0: Link down", "mlx5_core 0000:5c:00.0 eth0: Link up"),
]


@pytest.mark.parametrize(("down", "up"), DIALECTS)
def test_every_driver_has_its_own_words_for_a_link(down: str, up: str) -> None:
    lines = [kernel_log.Line(200.0, down), kernel_log.Line(100.0, up)]
    assert network.count_flaps(lines) == {"eth0": [100.0]}


def test_a_link_that_goes_down_and_up_with_the_machine_is_no_flap() -> None:
    down, up = "mlx5_core 0000:3b:00.0 eth0: Link down", "mlx5_core 0000:3b:00.0 eth0: Link up"
    across = [kernel_log.Line(300.0, down, -1), kernel_log.Line(100.0, up, 0)]
    assert network.count_flaps(across) == {"eth0": []}
    within = [kernel_log.Line(300.0, down, 0), kernel_log.Line(100.0, up, 0)]
    assert network.count_flaps(within) == {"eth0": [100.0]}


def test_the_first_link_after_boot_and_other_links_are_no_flaps() -> None:
    others = [
        "mlx5_core 0000:5c:00.0 ens1f0: Link up",
        "ata1: SATA link down (SStatus 0 SControl 300)",
        "IPv6: ADDRCONF(NETDEV_CHANGE): eth0: link becomes ready",
        "pcieport 0000:00:1c.0: pciehp: Slot(3): Link Down",
    ]
    assert network.count_flaps([kernel_log.Line(1.0, line) for line in others]) == {}


def test_a_name_that_the_inventory_declares_and_no_server_knows_is_a_failure() -> None:
    host = server(
        commands={
            ("getent", "ahosts", "registry.example"): Ran(2, "", ""),
            ("getent", "ahosts", "gate.example"): "10.0.0.9 STREAM gate.example\n",
        },
        params={"names": ["registry.example", "gate.example"]},
    )
    _is_blamed("network.dns", host, "network.dns.unresolved", FAIL, None)
    assert "registry.example: does not resolve (servers: 192.0.2.53)" in host.evidence


def test_only_names_that_a_person_gave_are_asked_for() -> None:
    host = server()
    record("network.dns", host)
    assert host.asked == [GETENT]


def test_an_option_is_no_host_name() -> None:
    assert record("network.dns", server(params={"names": ["-s"]})).status is Status.ERROR


def test_settings_may_not_leave_the_settings_tree() -> None:
    assert record("network.settings", server(params={"report": ["../../etc/shadow"]})).status is Status.ERROR


UNSHARE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
ASK = "import json; from probes.agent.host import Machine; from probes.checks import network; "
ASK += "print(json.dumps(dict((m.metric, m.value) for m in network.loopback(Machine()))))"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (Debian: util-linux)")
def test_a_loopback_that_is_down_is_seen_and_one_that_is_up_works() -> None:
    root = Path(__file__).resolve().parents[3]
    down = subprocess.run(
        [*UNSHARE, sys.executable, "-c", ASK],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert json.loads(down.stdout) == {"works": False}
    assert judged("network.loopback", server()).outcome is Outcome.PASS


def test_every_limit_of_the_family_has_a_fault_here() -> None:
    elsewhere = {
        "network.link_flaps.recoveries_12h",
        "network.link_flaps.recoveries_24h",
        "network.dns.unresolved",
        "network.dns.seconds",
        "network.loopback.works",
    }
    broken = {metric for metric, *_ in (*FAULTS, *COMMAND_FAULTS)} | elsewhere
    limited = {f"{c.name}.{metric}" for c in catalogue() if c.family == "network" for metric in c.demands}
    assert limited == broken


def test_a_slow_resolver_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 101.5))
    monkeypatch.setattr("probes.checks.network.time", SimpleNamespace(monotonic=lambda: next(clock)))
    _is_blamed("network.dns", server(), "network.dns.seconds", WARN, "node001")


MALFORMED: list[tuple[str, dict[str, str | None], dict[tuple[str, ...], Answer | None]]] = [
    ("network.interfaces", {f"{NET}/ens1f0/speed": "fast\n"}, {}),
    ("network.interface_errors", {f"{NET}/ens1f0/statistics/rx_errors": "?\n"}, {}),
    ("network.carrier", {f"{NET}/ens1f0/carrier_down_count": "?\n"}, {}),
    ("network.link_flaps", {"/dev/kmsg": "nonsense\n"}, {}),
    ("network.bonds", {"/proc/net/bonding/bond0": "no bond\n"}, {}),
    ("network.rdma_ports", {PORT + "/state": "ACTIVE\n"}, {}),
    ("network.rdma_ports", {PORT + "/rate": "fast\n"}, {}),
    ("network.rdma_errors", {PORT + "/counters/symbol_error": "none\n"}, {}),
    ("network.routes", {"/proc/net/route": "default via 10.0.0.1\n"}, {}),
    ("network.neighbours", {"/proc/net/stat/arp_cache": "entries allocs\n00000001\n"}, {}),
    ("network.neighbours", {"/proc/net/stat/arp_cache": "entries allocs\n"}, {}),
    ("network.conntrack", {"/proc/sys/net/netfilter/nf_conntrack_count": "many\n"}, {}),
    ("network.tcp", {"/proc/net/snmp": "Tcp: OutSegs\n"}, {}),
    ("network.nic_counters", {}, {("ethtool", "-S", "ens1f0"): "what?\n"}),
    ("network.optics", {}, {("ethtool", "-m", "ens1f0"): "what?\n"}),
]


@pytest.mark.parametrize(("name", "files", "commands"), MALFORMED)
def test_an_answer_that_cannot_be_understood_is_never_a_pass(
    name: str, files: dict[str, str | None], commands: dict[tuple[str, ...], Answer | None]
) -> None:
    assert record(name, server(files, commands)).status is Status.ERROR
    assert judged(name, server(files, commands)).outcome is Outcome.UNKNOWN


ANSWERS_ANYWHERE = {"network.rdma_devices", "network.loopback", "network.settings"}


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ANSWERS_ANYWHERE])
def test_a_machine_without_the_files_and_tools_is_unsupported_with_a_reason(name: str) -> None:
    said = record(name, ReplayHost())
    assert said.status is Status.UNSUPPORTED
    assert said.detail


def test_a_machine_without_rdma_devices_has_none_so_that_a_profile_can_ask_for_them() -> None:
    assert values("network.rdma_devices", ReplayHost())["count", None] == 0


def test_only_interfaces_with_hardware_behind_them_are_looked_at() -> None:
    veth = {f"{NET}/veth1/operstate": "down\n", f"{NET}/docker0/operstate": "down\n"}
    devices = {device for _, device in values("network.interfaces", server(veth))}
    assert devices == {"ens1f0", "ens1f1", None}


def test_inside_a_container_its_own_interface_is_looked_at() -> None:
    host = ReplayHost(
        files={
            f"{NET}/lo/operstate": "unknown\n",
            f"{NET}/eth0/operstate": "up\n",
            f"{NET}/eth0/mtu": "1450\n",
        }
    )
    found = values("network.interfaces", host)
    assert (found["up", None], found["mtus", None]) == (1, "1450 x1")


def test_a_link_that_is_down_has_no_speed() -> None:
    files = {f"{NET}/ens1f0/operstate": "down\n", f"{NET}/ens1f0/speed": "-1\n"}
    found = values("network.interfaces", server(files))
    assert ("speed", "ens1f0") not in found
    assert found["speeds", None] == "100000 x1"


def test_frames_that_nobody_asked_for_are_no_drops() -> None:
    files = {f"{NET}/ens1f0/statistics/rx_dropped": "300000000\n"}
    assert judged("network.interface_errors", server(files)).outcome is Outcome.PASS


def test_ports_that_are_not_used_can_be_named() -> None:
    files = {PORT + "/state": "1: DOWN\n", PORT + "/phys_state": "3: Disabled\n"}
    assert judged("network.rdma_ports", server(files, params={"ignore": ["mlx5_1"]})).outcome is Outcome.PASS


def test_an_accelerator_without_a_network_device_beside_it_is_named() -> None:
    far = {"/sys/bus/pci/devices/0000:18:00.0/numa_node": "1\n"}
    host = server(far)
    assert values("network.affinity", host)["without_network", None] == 1
    assert host.evidence == ["0000:18:00.0: no network device on NUMA node 1"]


def test_driver_counters_are_summed_by_kind() -> None:
    found = values("network.nic_counters", server())
    assert (found["symbol_errors", "ens1f0"], found["discards", "ens1f0"], found["link_downs", "ens1f0"]) == (
        7,
        5,
        1,
    )


def test_the_weakest_lane_counts_and_copper_has_none() -> None:
    found = values("network.optics", server())
    assert found["received_power", "ens1f0"] == -1.54
    assert found["warnings", "ens1f0"] == 0
    assert ethtool.parse_module(text("network/ethtool-module-copper.txt")) is None


def test_no_light_is_the_floor_of_what_modules_report() -> None:
    dark = ethtool.parse_module(MODULE.replace("0.7020 mW / -1.54 dBm", "0.0000 mW / -inf dBm"))
    assert dark is not None
    assert dark.received_dbm == -40.0


def test_a_real_h100_nodes_adapters_are_read(captures: Path) -> None:
    tree = captures / "captures/infiniband/sys-class-infiniband-h100.0"
    files = {
        f"{RDMA}/{path.relative_to(tree)}": path.read_text() for path in tree.rglob("*") if path.is_file()
    }
    devices = values("network.rdma_devices", ReplayHost(files=files))
    assert devices["count", None] == 3
    assert devices["firmware", "mlx5_0"] == "28.41.1000"
    ports = values("network.rdma_ports", ReplayHost(files=files))
    assert (ports["rates", None], ports["active", None]) == ("200 x1, 400 x2", 3)
    assert ports["link_layer", "mlx5_bond_0:1"] == "Ethernet"
    errors = values("network.rdma_errors", ReplayHost(files=files))
    assert errors["excessive_buffer_overrun_errors", "mlx5_0:1"] == 15
    # Fifteen overruns and fourteen receive errors in 3e11 packets are no fault.
    for name in ("network.rdma_devices", "network.rdma_ports", "network.rdma_errors"):
        assert judged(name, ReplayHost(files=files)).outcome is Outcome.PASS


def test_the_uptime_of_an_old_machine_makes_old_carrier_losses_harmless() -> None:
    files = {f"{NET}/ens1f0/carrier_down_count": "30\n"}
    assert values("network.carrier", server(files))["losses_per_day", "ens1f0"] == 30 / (UPTIME / 86_400)


def test_ports_without_counters_are_left_out_and_alone_are_unsupported() -> None:
    files = {
        f"{RDMA}/virtual/ports/1/state": "4: ACTIVE\n",
        f"{RDMA}/virtual/ports/1/counters/symbol_error": "N/A (no PMA)\n",
    }
    assert {device for _, device in values("network.rdma_errors", server(files))} == {"mlx5_0:1", "mlx5_1:1"}
    assert record("network.rdma_errors", ReplayHost(files=files)).status is Status.UNSUPPORTED
