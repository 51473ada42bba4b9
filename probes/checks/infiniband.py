"""RDMA devices (InfiniBand and RoCE) by sysfs: what is there, state of the ports, error counters."""

import re
from typing import Dict, Iterator, List, Set, Tuple

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import sysfs

ROOT = "/sys/class/infiniband"
FEWEST_PACKETS = 10_000_000
"""Shares of errors are taken of at least this many packets."""

COUNTERS = (
    "link_downed", "link_error_recovery", "symbol_error", "port_rcv_errors",
    "port_rcv_remote_physical_errors", "local_link_integrity_errors", "excessive_buffer_overrun_errors",
    "port_xmit_discards", "port_xmit_wait", "VL15_dropped",
)  # fmt: skip
HARDWARE_COUNTERS = (
    "local_ack_timeout_err", "out_of_sequence", "packet_seq_err", "rnr_nak_retry_err", "req_cqe_error",
    "resp_cqe_error", "roce_adp_retrans_to", "roce_slow_restart", "rx_icrc_encapsulated",
)  # fmt: skip
RECEIVED_BAD = (
    "symbol_error", "port_rcv_errors", "local_link_integrity_errors", "excessive_buffer_overrun_errors",
)  # fmt: skip
"""What a bad cable or transceiver shows at this end. Remote physical errors are another link's."""


def devices(host: Host) -> Iterator[Measure]:
    """How many RDMA devices there are, their firmware, board and NUMA node."""
    found = host.glob(ROOT + "/*")
    versions = []
    yield Measure("count", len(found))
    for path in found:
        name = path.rsplit("/", 1)[-1]
        for metric, file in (("firmware", "fw_ver"), ("board", "board_id"), ("kind", "hca_type")):
            value = host.read_or("%s/%s" % (path, file))
            if value:
                yield Measure(metric, value, name)
        versions.append("%s %s" % (host.read_or(path + "/board_id"), host.read_or(path + "/fw_ver")))
        numa = sysfs.integer(host, path + "/device/numa_node")
        if numa is not None:
            yield Measure("numa_node", numa, name)
    yield Measure("versions", sysfs.tally(versions))


def _ports(host: Host) -> List[Tuple[str, str]]:
    """(device:port, folder) of every port."""
    folders = host.glob(ROOT + "/*/ports/[0-9]*")
    if not folders:
        raise Unsupported("no RDMA device (no %s)" % ROOT)
    return [("%s:%s" % (folder.split("/")[4], folder.rsplit("/", 1)[-1]), folder) for folder in folders]


def ports(host: Host) -> Iterator[Measure]:
    """State, link layer and rate (Gb/s) of every port, but for those of devices in parameter `ignore`."""
    ignored = set(sysfs.strings(host.params.get("ignore"), "ignore"))
    active = stuck = down = 0
    rates = []
    for name, folder in _ports(host):
        if name.split(":")[0] in ignored:
            continue
        state = _word(host.read(folder + "/state"), folder + "/state")
        physical = _word(host.read(folder + "/phys_state"), folder + "/phys_state")
        yield Measure("state", state, name)
        yield Measure("physical", physical, name)
        yield Measure("link_layer", host.read_or(folder + "/link_layer"), name)
        if state == "ACTIVE":
            active += 1
            rates.append("%g" % parse_rate(host.read(folder + "/rate")))
            yield Measure("rate", float(rates[-1]), name)
        elif physical == "LinkUp":
            stuck += 1
            host.note("%s: the cable is up, the port is %s" % (name, state))
        else:
            down += 1
            host.note("%s: %s, %s" % (name, state, physical))
    yield Measure("rates", sysfs.tally(rates))
    yield Measure("active", active)
    yield Measure("stuck", stuck)
    yield Measure("down", down)


def errors(host: Host) -> Iterator[Measure]:
    """Error counters of every port since the driver loaded, and the share of packets received in error."""
    measured = False
    for name, folder in _ports(host):
        counts: Dict[str, int] = {}
        for kind, wanted in (("counters", COUNTERS), ("hw_counters", HARDWARE_COUNTERS)):
            for counter in wanted:
                path = "%s/%s/%s" % (folder, kind, counter)
                # Devices without a performance agent print "N/A (no PMA)".
                value = None if host.read_or(path).startswith("N/A") else sysfs.integer(host, path)
                if value is not None:
                    counts[counter] = value
        if not counts:
            continue  # A virtual function without counters.
        measured = True
        for counter, value in counts.items():
            yield Measure(counter.lower(), value, name)
        packets = sysfs.integer(host, folder + "/counters/port_rcv_packets") or 0
        bad = sum(counts.get(counter, 0) for counter in RECEIVED_BAD)
        yield Measure("error_share", bad / max(packets, FEWEST_PACKETS), name)
        shown = ["%s %d" % (c, counts[c]) for c in COUNTERS if counts.get(c) and c != "port_xmit_wait"]
        if shown:
            host.note("%s: %s" % (name, ", ".join(shown)))
    if not measured:
        raise Unsupported("no RDMA port has error counters")


def affinity(host: Host) -> Iterator[Measure]:
    """Accelerators without a network device on their own NUMA node: their traffic crosses the sockets."""
    accelerators: Dict[str, int] = {}
    networks: Set[int] = set()
    for path in host.glob("/sys/bus/pci/devices/*/class"):
        kind = host.read_or(path)
        folder = path.rsplit("/", 1)[0]
        node = sysfs.integer(host, folder + "/numa_node")
        if kind[:6] in ("0x0302", "0x1200"):
            accelerators[folder.rsplit("/", 1)[-1]] = -1 if node is None else node
        elif kind[:6] in ("0x0200", "0x0207") and node is not None:
            networks.add(node)
    if not accelerators:
        raise Unsupported("no PCI device of an accelerator class (0302, 1200)")
    nodes = len(host.glob("/sys/devices/system/node/node[0-9]*"))
    unknown = sorted(device for device, node in accelerators.items() if node < 0)
    # One NUMA node: -1 means no more than that there is nothing to tell apart.
    yield Measure("unknown_node", len(unknown) if nodes > 1 else 0)
    alone = sorted(device for device, node in accelerators.items() if node >= 0 and node not in networks)
    yield Measure("without_network", len(alone))
    for device in alone:
        host.note("%s: no network device on NUMA node %d" % (device, accelerators[device]))


def parse_rate(text: str) -> float:
    """``400 Gb/sec (4X NDR)`` as 400."""
    found = re.match(r"([\d.]+) Gb/sec", text.strip())
    if not found:
        raise ValueError("rate: expected 'N Gb/sec', got %r" % text[:80])
    return float(found.group(1))


def _word(text: str, where: str) -> str:
    """``4: ACTIVE`` as ACTIVE."""
    number, found, word = text.strip().partition(": ")
    if not found or not number.isdigit():
        raise ValueError("%s: expected 'number: word', got %r" % (where, text[:80]))
    return word
