"""A healthy two-socket server with two accelerators' worth of network, as files and command outputs.

    host = server(files={"/proc/swaps": "..."}, params={...})     # the healthy server, with these differences
    judged("host.swap", host)                                     # by the catalogue's own limits

Kernel files follow the formats of proc(5) and of the kernel's Documentation/ABI; the tools' outputs stand in
``fixtures/`` with their origin. `None` as a file or command takes it away.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from probes.agent.api import TimedOut, Unsupported
from probes.catalogue import Catalogue, load_catalogue
from probes.criteria import Judged, compile_rules, judge
from probes.model import CheckRecord, Measure, Status, Value
from tests.probes.replay import Answer, ReplayHost

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("host", "network", "bmc")
UPTIME = 864_000.0
"""Ten days."""
BOOT = 1_794_000_000


def text(name: str) -> str:
    return (FIXTURES / name).read_text()


def kmsg(*events: tuple[float, str]) -> str:
    """/dev/kmsg of this boot: its first line, then texts at so many seconds before now."""
    lines = ["5,0,0,-;Linux version 6.8.0-generic (builder@example) #1 SMP"]
    lines += [f"6,{i},{round((UPTIME - age) * 1e6)},-;{words}" for i, (age, words) in enumerate(events, 1)]
    return "\n".join(lines) + "\n"


CPU = "/sys/devices/system/cpu"
NODE = "/sys/devices/system/node"
NET = "/sys/class/net"
PCI = "/sys/bus/pci/devices"
RDMA = "/sys/class/infiniband"
EDAC = "/sys/devices/system/edac/mc/mc0"


def _cpu_files() -> dict[str, str]:
    blocks = [
        f"processor\t: {n}\nmodel name\t: Example CPU 9999\nmicrocode\t: 0x2b0004b1\ncpu MHz\t\t: 3100.{n}\n"
        f"physical id\t: {n % 4 // 2}\ncore id\t\t: {n % 2}\n"
        for n in range(8)
    ]
    files = {
        "/proc/cpuinfo": "\n".join(blocks),
        CPU + "/online": "0-7\n",
        CPU + "/present": "0-7\n",
        CPU + "/smt/control": "on\n",
        CPU + "/vulnerabilities/meltdown": "Not affected\n",
        CPU + "/vulnerabilities/spectre_v2": "Mitigation: Enhanced IBRS\n",
        CPU + "/cpufreq/policy0/scaling_governor": "performance\n",
        CPU + "/cpufreq/policy0/scaling_driver": "intel_pstate\n",
        CPU + "/cpufreq/policy0/scaling_max_freq": "3800000\n",
        CPU + "/cpufreq/policy0/cpuinfo_max_freq": "3800000\n",
        CPU + "/cpu0/thermal_throttle/core_throttle_count": "2\n",
        CPU + "/cpu0/thermal_throttle/package_throttle_count": "3\n",
        CPU + "/cpu0/thermal_throttle/package_throttle_total_time_ms": "40\n",
    }
    for n in range(8):
        files[f"{CPU}/cpu{n}/topology/physical_package_id"] = f"{n % 4 // 2}\n"
        files[f"{CPU}/cpu{n}/topology/core_id"] = f"{n % 2}\n"
    return files


def _kernel_files() -> dict[str, str]:
    return {
        "/dev/kmsg": kmsg(
            (UPTIME - 4, "mlx5_core 0000:5c:00.0 ens1f0: Link up"), (600, "systemd[1]: Started.")
        ),
        "/proc/uptime": f"{UPTIME} 6000000.00\n",
        "/proc/stat": f"cpu  1 2 3 4\nbtime {BOOT}\n",
        "/proc/sys/kernel/tainted": "12288\n",
        "/proc/sys/kernel/osrelease": "6.8.0-generic\n",
        "/proc/sys/kernel/hostname": "node001\n",
        "/proc/sys/kernel/numa_balancing": "0\n",
        "/proc/sys/kernel/pid_max": "4194304\n",
        "/proc/sys/kernel/threads-max": "8000000\n",
        "/proc/sys/kernel/random/boot_id": "11111111-2222-3333-4444-555555555555\n",
        "/proc/sys/fs/file-nr": "20000\t0\t9223372036854775807\n",
        "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=1-2 ro iommu=pt quiet\n",
        "/proc/modules": "mlx5_core 1 0 - Live 0x0\nexample_peermem 1 0 - Live 0x0\n",
        "/proc/loadavg": "0.80 0.70 0.60 2/1500 4242\n",
        "/proc/pressure/cpu": "some avg10=0.00 avg60=1.20 avg300=0.50 total=1\n",
        "/proc/pressure/memory": psi(0.0),
        "/proc/pressure/io": psi(0.4),
        "/proc/1/stat": "1 (systemd) S 0 1 1 0 -1 4194560 1 1",
        "/proc/2/stat": "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0",
        "/proc/77/stat": "77 (nv_queue) D 2 0 0 0 -1 2129984 0 0",
        "/proc/4242/stat": "4242 (my (odd) job) D 1 1 1 0 -1 4194304 0 0",
        "/proc/4242/sched": sched(2),
        "/proc/self/limits": LIMITS,
        "/etc/os-release": 'ID=ubuntu\nVERSION_ID="24.04"\n',
        "/sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "/sys/class/dmi/id/bios_version": "2.1\n",
        "/sys/class/dmi/id/product_name": "Example 8000\n",
        "/sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "/sys/devices/system/clocksource/clocksource0/available_clocksource": "tsc hpet acpi_pm\n",
        "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "/sys/kernel/iommu_groups/0/type": "identity\n",
        EDAC + "/ue_count": "0\n",
        EDAC + "/ce_count": "4\n",
        EDAC + "/seconds_since_reset": f"{round(UPTIME)}\n",
        EDAC + "/dimm0/dimm_label": "CPU_SrcID#0_MC#0_Chan#0_DIMM#0\n",
        EDAC + "/dimm0/dimm_ue_count": "0\n",
        EDAC + "/dimm0/dimm_ce_count": "4\n",
        "/run/docker.sock": "",
        "/dev/ipmi0": "",
    }


def _memory_files() -> dict[str, str]:
    return {
        "/proc/meminfo": meminfo(),
        "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        "/proc/vmstat": "pswpin 0\npswpout 0\n",
        "/proc/buddyinfo": "Node 0, zone      DMA      0 0 0 0 0 0 0 0 1 1 2\n"
        "Node 0, zone   Normal   1651 456 549 253 143 63 182 128 87 58 535 \n"
        "Node 1, zone   Normal    651 456 549 253 143 63 182 128 87 58 535 \n",
        NODE + "/node0/meminfo": "Node 0 MemTotal:       65000000 kB\nNode 0 MemFree: 1 kB\n",
        NODE + "/node0/cpulist": "0-3\n",
        NODE + "/node1/meminfo": "Node 1 MemTotal:       66000000 kB\nNode 1 MemFree: 1 kB\n",
        NODE + "/node1/cpulist": "4-7\n",
    }


def _network_files() -> dict[str, str]:
    files = {
        "/proc/net/bonding/bond0": text("network/bond0.txt"),
        "/proc/net/route": ROUTE + "ens1f0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
        "/proc/net/stat/arp_cache": ARP,
        "/proc/sys/net/ipv4/neigh/default/gc_thresh3": "1024\n",
        "/proc/sys/net/netfilter/nf_conntrack_count": "120\n",
        "/proc/sys/net/netfilter/nf_conntrack_max": "262144\n",
        "/proc/sys/net/core/rmem_max": "268435456\n",
        "/proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t268435456\n",
        "/proc/net/snmp": "Tcp: InSegs OutSegs RetransSegs\nTcp: 9000000 8000000 900\n",
        "/proc/net/netstat": "TcpExt: SyncookiesSent ListenOverflows\nTcpExt: 0 3\n",
        "/etc/resolv.conf": "# example\nnameserver 192.0.2.53\n",
        f"{PCI}/0000:18:00.0/class": "0x030200\n",
        f"{PCI}/0000:18:00.0/numa_node": "0\n",
        f"{PCI}/0000:5c:00.0/class": "0x020700\n",
        f"{PCI}/0000:5c:00.0/numa_node": "0\n",
        f"{PCI}/0000:18:00.0/aer_dev_fatal": AER,
        f"{PCI}/0000:18:00.0/aer_dev_nonfatal": AER + "UnsupReq 4\n",
        f"{PCI}/0000:18:00.0/aer_dev_correctable": "RxErr 0\nBadTLP 7\nTOTAL_ERR_COR 7\n",
    }
    for name in ("ens1f0", "ens1f1"):
        folder = f"{NET}/{name}"
        files |= {
            f"{folder}/device/vendor": "0x15b3\n",
            f"{folder}/operstate": "up\n",
            f"{folder}/speed": "100000\n",
            f"{folder}/duplex": "full\n",
            f"{folder}/mtu": "9000\n",
            f"{folder}/carrier_down_count": "3\n",
            f"{folder}/statistics/rx_packets": "400000000\n",
            f"{folder}/statistics/tx_packets": "400000000\n",
            f"{folder}/statistics/rx_errors": "0\n",
            f"{folder}/statistics/tx_errors": "0\n",
            f"{folder}/statistics/rx_missed_errors": "12\n",
            f"{folder}/statistics/rx_dropped": "90000\n",
        }
    for name in ("mlx5_0", "mlx5_1"):
        files |= {
            f"{RDMA}/{name}/fw_ver": "28.41.1000\n",
            f"{RDMA}/{name}/board_id": "MT_0000000838\n",
            f"{RDMA}/{name}/hca_type": "MT4129\n",
            f"{RDMA}/{name}/ports/1/state": "4: ACTIVE\n",
            f"{RDMA}/{name}/ports/1/phys_state": "5: LinkUp\n",
            f"{RDMA}/{name}/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            f"{RDMA}/{name}/ports/1/link_layer": "InfiniBand\n",
            f"{RDMA}/{name}/ports/1/counters/port_rcv_packets": "300000000000\n",
            f"{RDMA}/{name}/ports/1/counters/port_rcv_errors": "14\n",
            f"{RDMA}/{name}/ports/1/counters/link_downed": "1\n",
        }
    return files


def meminfo(available: int = 120_000_000, corrupted: int = 0) -> str:
    return (
        f"MemTotal:       131000000 kB\nMemAvailable:   {available} kB\n"
        f"HardwareCorrupted: {corrupted} kB\nHugePages_Total:       0\nHugePages_Free:        0\n"
    )


def psi(avg60: float) -> str:
    figures = f"avg10=0.00 avg60={avg60:.2f} avg300=0.00 total=1\n"
    return f"some {figures}full {figures}"


def sched(idle: float) -> str:
    stamp = (UPTIME - idle) * 1000
    return f"job (4242, #threads: 1)\n-----\nse.exec_start                                : {stamp:.6f}\n"


AER = "Undefined 0\nDLP 0\nTLP 0\nTOTAL_ERR_FATAL 0\n"
ARP = "entries  allocs table_fulls\n00000010 00000020 00000000\n00000010 00000001 00000000\n"
ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max stack size            8388608              unlimited            bytes     \n"
    "Max core file size        0                    unlimited            bytes     \n"
    "Max processes             515000               515000               processes \n"
    "Max open files            1024                 1048576              files     \n"
    "Max locked memory         unlimited            unlimited            bytes     \n"
)
DPKG = ("dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\\n")
SYSTEMCTL = ("systemctl", "list-units", "--state=failed", "--all", "--plain", "--no-legend", "--no-pager")
DOCKER = ("docker", "version", "--format", "{{.Server.Version}}")
CONTAINER = "ltpctl-probe-11111111-2222-3333-4444-555555555555"
DOCKER_RUN = (
    "docker",
    "run",
    "--rm",
    "--pull=never",
    "--network=none",
    "--name",
    CONTAINER,
    "example",
    "true",
)
SEL = ("ipmitool", "sel", "elist", "last", "300")


def _commands() -> dict[tuple[str, ...], Answer]:
    return {
        ("chronyc", "-n", "tracking"): text("host/chronyc-tracking.txt"),
        ("dmidecode", "-t", "17"): text("host/dmidecode-17.txt"),
        ("lspci", "-vvv"): text("host/lspci-vvv.txt"),
        SYSTEMCTL: "",
        (*DPKG, "example-driver"): "ii  example-driver 550.54-0ubuntu1\n",
        DOCKER: "28.2.2\n",
        DOCKER_RUN: "",
        ("getent", "ahosts", "node001"): "10.0.0.1       STREAM node001\n10.0.0.1       DGRAM\n",
        ("ethtool", "-S", "ens1f0"): text("network/ethtool-statistics.txt"),
        ("ethtool", "-S", "ens1f1"): text("network/ethtool-statistics.txt"),
        ("ethtool", "-m", "ens1f0"): text("network/ethtool-module.txt"),
        ("ethtool", "-m", "ens1f1"): text("network/ethtool-module-copper.txt"),
        ("ipmitool", "mc", "info"): text("bmc/mc-info.txt"),
        SEL: text("bmc/sel-elist.txt"),
        ("ipmitool", "sel", "info"): text("bmc/sel-info.txt"),
        ("ipmitool", "sel", "time", "get"): "11/21/2026 09:50:00\n",
        ("ipmitool", "sdr", "elist"): text("bmc/sdr-elist.txt"),
    }


DECLARED: dict[str, dict[str, object]] = {
    "host.container_start": {"image": "example"},
    "host.packages": {"packages": {"example-driver": "550.54"}},
    "host.kernel_options": {"required": ["iommu=pt"], "forbidden": ["nosmt"]},
    "host.modules": {"required": ["mlx5_core", "example-peermem"], "forbidden": ["nouveau"]},
    "network.settings": {
        "expected": {"net.core.rmem_max": ">= 134217728", "net.ipv4.tcp_rmem": "4096 131072 268435456"}
    },
    "network.interfaces": {"expect_up": ["ens1f*"]},
}
"""What the inventory of this server says beyond the catalogue."""


def server(
    files: Mapping[str, str | Exception | None] | None = None,
    commands: Mapping[tuple[str, ...], Answer | None] | None = None,
    params: Mapping[str, object] | None = None,
) -> ReplayHost:
    have: dict[str, str | Exception | None] = {
        **_cpu_files(), **_kernel_files(), **_memory_files(), **_network_files(), **(files or {})
    }  # fmt: skip
    ran: dict[tuple[str, ...], Answer | None] = {**_commands(), **(commands or {})}
    return ReplayHost(
        files={path: content for path, content in have.items() if content is not None},
        commands={argv: answer for argv, answer in ran.items() if answer is not None},
        params=dict(params or {}),
    )


@cache
def catalogue() -> Catalogue:
    return Catalogue({check.name: check for check in load_catalogue() if check.family in FAMILIES})


def record(name: str, host: ReplayHost) -> CheckRecord:
    """What the check says on `host`, whose own parameters are laid over the catalogue's."""
    spec = catalogue().check(name).spec
    host.params = {**spec.params, **host.params}
    beside, _, function = str(spec.collect).rpartition(".")
    module = importlib.import_module(f"probes.checks.{beside or name.partition('.')[0]}")
    try:
        found = [Measure(m.metric, m.device, m.value) for m in getattr(module, function)(host)]
    except Unsupported as error:
        return CheckRecord(name, Status.UNSUPPORTED, detail=str(error))
    except TimedOut as error:
        return CheckRecord(name, Status.TIMEOUT, detail=str(error))
    except ValueError as error:
        return CheckRecord(name, Status.ERROR, detail=str(error))
    undeclared = {m.metric for m in found} - set(spec.metrics)
    assert not undeclared, f"{name} measures what its catalogue entry does not name: {undeclared}"
    return CheckRecord(name, Status.ANSWERED, measures=tuple(found), evidence=tuple(host.evidence))


def judged(name: str, host: ReplayHost) -> Judged:
    return judge(compile_rules(catalogue()), name, record(name, host))


def values(name: str, host: ReplayHost) -> dict[tuple[str, str | None], Value]:
    """(metric, device) -> value."""
    got = record(name, host)
    assert got.status is Status.ANSWERED, got.detail
    return {(m.metric, m.device): m.value for m in got.measures}
