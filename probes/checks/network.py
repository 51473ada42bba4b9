"""The node's Ethernet and its TCP/IP: interfaces, errors, flaps, bonds, tables, names."""

import fnmatch
import re
import socket
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from probes.agent.api import Host, Measure, TimedOut, Unsupported
from probes.checks import kernel_log, sysfs

NET = "/sys/class/net"
FEWEST_PACKETS = 100_000
"""Shares of errors are of at least this many packets: three in the first hundred mean nothing."""


def _interfaces(host: Host) -> List[str]:
    """Interfaces with hardware behind them; inside a container, where none is visible, all but loopback."""
    names = sorted({path.split("/")[4] for path in host.glob(NET + "/*/operstate")})
    real = [name for name in names if host.glob("%s/%s/device" % (NET, name))]
    chosen = real or [name for name in names if name != "lo"]
    if not chosen:
        raise Unsupported("no network interface besides loopback")
    return chosen


def interfaces(host: Host) -> Iterator[Measure]:
    """State, speed (Mb/s), duplex, MTU of each interface; those in parameter `expect_up` must be up."""
    up = []
    mtus, speeds = [], []
    for name in _interfaces(host):
        folder = "%s/%s" % (NET, name)
        state, working = _state(host, name)
        yield Measure("state", state, name)
        if not working:
            continue
        up.append(name)
        mtu = sysfs.integer(host, folder + "/mtu")
        if mtu is not None:
            yield Measure("mtu", mtu, name)
            mtus.append(str(mtu))
        speed = sysfs.integer(host, folder + "/speed")
        if speed is not None and speed > 0:
            yield Measure("speed", speed, name)
            speeds.append(str(speed))
        duplex = host.read_or(folder + "/duplex")
        if duplex:
            yield Measure("duplex", duplex, name)
    yield Measure("up", len(up))
    yield Measure("mtus", sysfs.tally(mtus))
    yield Measure("speeds", sysfs.tally(speeds))
    down = 0
    # Bonds, bridges and VLANs too, which have no hardware of their own.
    present = sorted({path.split("/")[4] for path in host.glob(NET + "/*/operstate")})
    for pattern in sysfs.strings(host.params.get("expect_up"), "expect_up"):
        named = fnmatch.filter(present, pattern)
        missing = [name for name in named if not _state(host, name)[1]] if named else [pattern]
        down += len(missing)
        for name in missing:
            host.note("%s should be up: %s" % (name, "is not" if named else "no such interface"))
    yield Measure("expected_down", down)


def _state(host: Host, name: str) -> Tuple[str, bool]:
    """What the kernel calls the interface's state, and whether it carries traffic."""
    folder = "%s/%s" % (NET, name)
    state = host.read_or(folder + "/operstate", "unknown")
    # Drivers without carrier detection say "unknown" while they work.
    return state, state == "up" or (state == "unknown" and host.read_or(folder + "/carrier") == "1")


ERRORS = (
    "rx_errors",
    "tx_errors",
    "rx_crc_errors",
    "rx_missed_errors",
    "rx_fifo_errors",
    "rx_dropped",
    "tx_dropped",
)


def interface_errors(host: Host) -> Iterator[Measure]:
    """Error and drop counters of each interface, and their shares of the packets since boot."""
    measured = False
    for name in _interfaces(host):
        folder = "%s/%s/statistics/" % (NET, name)
        packets = (sysfs.integer(host, folder + "rx_packets") or 0) + (
            sysfs.integer(host, folder + "tx_packets") or 0
        )
        counts = {metric: sysfs.integer(host, folder + metric) for metric in ERRORS}
        if counts["rx_errors"] is None:
            continue
        measured = True
        for metric, count in counts.items():
            if count is not None:
                yield Measure(metric, count, name)
        of = max(packets, FEWEST_PACKETS)
        errors = sum(counts[m] or 0 for m in ("rx_errors", "tx_errors"))
        # rx_dropped is left out: it counts frames that nobody on this node asked for.
        drops = sum(counts[m] or 0 for m in ("rx_missed_errors", "rx_fifo_errors", "tx_dropped"))
        yield Measure("error_share", round(errors / of, 9), name)
        yield Measure("drop_share", round(drops / of, 9), name)
    if not measured:
        raise Unsupported("no interface has statistics")


def carrier(host: Host) -> Iterator[Measure]:
    """How often each interface lost its carrier since boot, and per day."""
    days = max(1.0, sysfs.uptime(host) / 86400.0)
    measured = False
    for name in _interfaces(host):
        losses = sysfs.integer(host, "%s/%s/carrier_down_count" % (NET, name))
        if losses is None:
            continue
        measured = True
        yield Measure("losses", losses, name)
        yield Measure("losses_per_day", round(losses / days, 3), name)
    if not measured:
        raise Unsupported("no interface counts carrier losses (kernel older than 4.16)")


DOWN = re.compile(r"(?P<device>[A-Za-z][\w.@-]{0,14}):? (?:NIC )?Link (?:is )?[Dd]own\b")
UP = re.compile(r"(?P<device>[A-Za-z][\w.@-]{0,14}):? (?:NIC )?Link (?:is )?[Uu]p\b")
"""What drivers log: mlx5 ``ens1: Link down``; ixgbe, ice, bnxt ``eth0: NIC Link is Down``; r8169, tg3."""


def link_flaps(host: Host) -> Iterator[Measure]:
    """Links that went down and came back, by the kernel log: in the last 12 and 24 hours."""
    log = kernel_log.read(host, 24)
    flaps = count_flaps(log.lines)
    for device in sorted(flaps) or [""]:
        ages = flaps.get(device, [])
        yield Measure("recoveries_12h", sum(age <= 12 * 3600 for age in ages), device or None)
        yield Measure("recoveries_24h", len(ages), device or None)
    yield Measure("log_hours", round(log.hours, 2))
    for line in log.lines:
        if DOWN.search(line.text) or UP.search(line.text):
            host.note("%.1f h ago: %s" % (line.age / 3600, line.text))


def count_flaps(lines: List[kernel_log.Line]) -> Dict[str, List[float]]:
    """Device -> ages in seconds of its recoveries: an "up" after a "down", so not the first after boot."""
    recoveries: Dict[str, List[float]] = {}
    down: Set[str] = set()
    boot = 0
    for line in lines:
        if line.boot != boot:
            # Links go down with the machine and come up with it: a restart is no flap.
            boot = line.boot
            down.clear()
        lost, back = DOWN.search(line.text), UP.search(line.text)
        if lost:
            down.add(lost.group("device"))
            recoveries.setdefault(lost.group("device"), [])
        elif back and back.group("device") in down:
            down.discard(back.group("device"))
            recoveries[back.group("device")].append(line.age)
    return recoveries


class Bond(NamedTuple):
    mode: str
    up: bool
    members: Dict[str, Dict[str, str]]
    """Name -> its lines."""


def bonds(host: Host) -> Iterator[Measure]:
    """Each bond: its state, its members, those that are down or outside the active aggregate."""
    files = host.glob("/proc/net/bonding/*")
    if not files:
        raise Unsupported("no bonded interface")
    for path in files:
        name = path.rsplit("/", 1)[-1]
        bond = parse_bond(host.read(path))
        down = [m for m, values in bond.members.items() if values.get("MII Status") != "up"]
        yield Measure("mode", bond.mode, name)
        yield Measure("up", bond.up, name)
        yield Measure("members", len(bond.members), name)
        yield Measure("members_down", len(down), name)
        aggregates = {
            v["Aggregator ID"] for m, v in bond.members.items() if m not in down and "Aggregator ID" in v
        }
        yield Measure("split", max(0, len(aggregates) - 1), name)
        failures = [int(values.get("Link Failure Count", 0)) for values in bond.members.values()]
        yield Measure("link_failures", sum(failures), name)
        for member in bond.members:
            values = bond.members[member]
            host.note(
                "%s %s: %s, %s"
                % (name, member, values.get("MII Status"), values.get("Speed", "unknown speed"))
            )


def parse_bond(text: str) -> Bond:
    """/proc/net/bonding/NAME: the bond's lines, then a block for each ``Slave Interface``."""
    head, *blocks = re.split(r"^Slave Interface: ", text, flags=re.MULTILINE)
    values = sysfs.keyed(head)
    if "Bonding Mode" not in values or "MII Status" not in values:
        raise ValueError("bonding: no lines 'Bonding Mode' and 'MII Status' in %r" % text[:80])
    members = {block.split("\n", 1)[0].strip(): sysfs.keyed(block) for block in blocks}
    return Bond(values["Bonding Mode"], values["MII Status"] == "up", members)


def routes(host: Host) -> Iterator[Measure]:
    """Default routes, IPv4 and IPv6."""
    lines = host.read("/proc/net/route").splitlines()
    if not lines or not lines[0].startswith("Iface"):
        raise ValueError("/proc/net/route: expected a header line that starts with Iface")
    found = []
    for line in lines[1:]:
        words = line.split()
        if len(words) > 7 and words[1] == words[7] == "00000000" and int(words[3], 16) & 1:
            found.append(words[0])
    for line in host.read_or("/proc/net/ipv6_route").splitlines():
        words = line.split()
        if len(words) == 10 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
            found.append(words[9])
    yield Measure("default_routes", len(found))
    yield Measure("default_interfaces", ", ".join(sorted(set(found))))


def neighbours(host: Host) -> Iterator[Measure]:
    """Neighbour (ARP, NDP) table entries as a share of the hard limit, and overflows since boot."""
    for name, file, family in (("ipv4", "arp_cache", "ipv4"), ("ipv6", "ndisc_cache", "ipv6")):
        text = (
            host.read("/proc/net/stat/" + file) if name == "ipv4" else host.read_or("/proc/net/stat/" + file)
        )
        if not text:
            continue
        rows = parse_statistics(text)
        entries = rows[0].get("entries", 0)
        yield Measure("entries", entries, name)
        yield Measure("overflows", sum(row.get("table_fulls", 0) for row in rows), name)
        most = sysfs.integer(host, "/proc/sys/net/%s/neigh/default/gc_thresh3" % family)
        if most:
            yield Measure("share", round(entries / most, 4), name)


def parse_statistics(text: str) -> List[Dict[str, int]]:
    """/proc/net/stat/*: a header of names, then a row of hexadecimal numbers for each CPU."""
    header, *rows = text.strip().splitlines()
    names = header.split()
    parsed = []
    for row in rows:
        words = row.split()
        if len(words) != len(names):
            raise ValueError("/proc/net/stat: %d columns under %d names" % (len(words), len(names)))
        parsed.append({name: int(word, 16) for name, word in zip(names, words)})
    if not parsed:
        raise ValueError("/proc/net/stat: no rows under the header")
    return parsed


def conntrack(host: Host) -> Iterator[Measure]:
    """Tracked connections as a share of the limit, and packets dropped because the table was full."""
    folder = "/proc/sys/net/netfilter/"
    count = sysfs.integer(host, folder + "nf_conntrack_count")
    most = sysfs.integer(host, folder + "nf_conntrack_max")
    if count is None or not most:
        raise Unsupported("connection tracking is not loaded")
    yield Measure("connections", count)
    yield Measure("share", round(count / most, 4))
    text = host.read_or("/proc/net/stat/nf_conntrack")
    if text:
        rows = parse_statistics(text)
        yield Measure("drops", sum(row.get("drop", 0) + row.get("early_drop", 0) for row in rows))


FEWEST_SEGMENTS = 10_000


def tcp(host: Host) -> Iterator[Measure]:
    """TCP segments sent and sent again since boot, and connections refused by full listen queues."""
    values = parse_snmp(host.read("/proc/net/snmp"), "Tcp")
    if "OutSegs" not in values or "RetransSegs" not in values:
        raise ValueError("/proc/net/snmp: no OutSegs and RetransSegs among the Tcp values")
    yield Measure("sent", values["OutSegs"])
    yield Measure("retransmitted", values["RetransSegs"])
    yield Measure(
        "retransmitted_share", round(values["RetransSegs"] / max(values["OutSegs"], FEWEST_SEGMENTS), 6)
    )
    text = host.read_or("/proc/net/netstat")
    if text:
        yield Measure("listen_overflows", parse_snmp(text, "TcpExt").get("ListenOverflows", 0))


def parse_snmp(text: str, protocol: str) -> Dict[str, int]:
    """/proc/net/snmp and netstat: two lines a protocol, names and then numbers."""
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith(protocol + ":")]
    if len(lines) != 2 or len(lines[0]) != len(lines[1]):
        raise ValueError("expected two lines of the same length that start with %r" % (protocol + ":"))
    return dict(zip(lines[0], map(int, lines[1])))


def loopback(host: Host) -> Iterator[Measure]:
    """Whether a TCP connection over 127.0.0.1 carries a byte there and back, and how long that takes."""
    limit = float(host.params.get("seconds", 2))
    started = time.monotonic()
    try:
        with socket.socket() as listener:
            listener.settimeout(limit)
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname(), limit) as near:
                far = listener.accept()[0]
                with far:
                    far.settimeout(limit)
                    near.sendall(b"?")
                    far.sendall(far.recv(1))
                    works = near.recv(1) == b"?"
    except OSError as error:
        host.note("127.0.0.1: %s" % error)
        works = False
    yield Measure("works", works)
    if works:
        yield Measure("seconds", round(time.monotonic() - started, 6))


def dns(host: Host) -> Iterator[Measure]:
    """Whether the names of parameter `names`, or else this node's own, get an address, and how fast."""
    servers = re.findall(r"^\s*nameserver\s+(\S+)", host.read_or("/etc/resolv.conf"), re.MULTILINE)
    yield Measure("servers", len(servers))
    declared = sysfs.strings(host.params.get("names"), "names")
    names = declared or [host.read("/proc/sys/kernel/hostname").strip()]
    resolved = 0
    for name in names:
        if name.startswith("-"):
            raise ValueError("parameter names: %r is no host name" % name)
        started = time.monotonic()
        found, said = _resolve(host, name)
        if found:
            resolved += 1
            yield Measure("seconds", round(time.monotonic() - started, 4), name)
            host.note("%s: %s" % (name, found))
        else:
            host.note("%s: %s (servers: %s)" % (name, said, ", ".join(servers) or "none"))
    missing = len(names) - resolved
    if declared:
        yield Measure("unresolved", missing)
    else:
        yield Measure("own_name", missing == 0)


def _resolve(host: Host, name: str) -> Tuple[Optional[str], str]:
    try:
        ran = host.run(("getent", "ahosts", name), timeout=float(host.params.get("seconds", 5)), ok=())
    except TimedOut as late:
        return None, "no answer: %s" % late
    words = ran.out.split()
    return (words[0], "") if ran.code == 0 and words else (None, "does not resolve")


def settings(host: Host) -> Iterator[Measure]:
    """Kernel settings (sysctl): those of parameter `report` as values, those of `expected` compared.

    `expected` maps a name to its value, or to ``>= N`` for a number that may be larger.
    """
    expected = host.params.get("expected") or {}
    if not isinstance(expected, dict):
        raise ValueError("parameter expected: expected setting -> value, got %r" % (expected,))
    different = 0
    for name in sysfs.strings(host.params.get("report"), "report"):
        value = _setting(host, name)
        if value:
            yield Measure("value", value, name)
    for name, wanted in sorted(expected.items()):
        value = _setting(host, name)
        if not meets(value, str(wanted)):
            different += 1
            host.note("%s is %s, declared %s" % (name, value or "absent", wanted))
    yield Measure("declared", len(expected))
    yield Measure("different", different)


def meets(value: str, wanted: str) -> bool:
    """Whether a setting's text is as declared; tabs and blanks between several numbers are alike."""
    if wanted.startswith(">="):
        return value.isdigit() and int(value) >= int(wanted[2:])
    return value.split() == wanted.split()


def _setting(host: Host, name: str) -> str:
    if not re.fullmatch(r"[\w./-]+", name) or ".." in name:
        raise ValueError("%r is not the name of a kernel setting, such as net.core.rmem_max" % name)
    # Slashes as in `sysctl`: net/ipv4/conf/eth0.100/mtu has a dot inside a name.
    path = name if "/" in name else name.replace(".", "/")
    return " ".join(host.read_or("/proc/sys/" + path).split())
