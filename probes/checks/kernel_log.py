"""The kernel's own log, neither cleared nor waited for: the ring buffer, and the journal for what it lost.

Ages are seconds before now. "Now" is boot time plus uptime, both from /proc, so a wrong wall clock does not
move events of this boot, and captures replay to the same result.
"""

import re
from typing import List, NamedTuple, Optional, Tuple

from probes.agent.api import Host, TimedOut, Unsupported
from probes.checks import sysfs

DEVICE = "/dev/kmsg"
RING = ("dmesg", "-r")
"""Where the device is not readable. Raw format, ``<6>[   12.345678] text``: util-linux and busybox alike."""

_RING_LINE = re.compile(r"^(?:<\d+>)?\[\s*(\d+\.\d+)\](?:\[\s*[TC]\d+\])?\s?(.*)$")
_RECORD = re.compile(r"^\d+,\d+,(\d+),[^;]*;(.*)$")
_JOURNAL_LINE = re.compile(r"^(\d+(?:\.\d+)?) \S+ kernel: (.*)$")


class Line(NamedTuple):
    age: float
    """Seconds before now."""
    text: str


class Log(NamedTuple):
    lines: List[Line]
    """Oldest first, all within the window."""
    hours: float
    """How far back the lines reach without a gap, at most the window."""


def read(host: Host, hours: float) -> Log:
    """The kernel's lines of the last `hours`, earlier boots included where the journal is kept.

    Raises Unsupported with the reason when neither /dev/kmsg nor dmesg nor journalctl may be read, ValueError
    when what they give is not a kernel log.
    """
    window = hours * 3600.0
    uptime = sysfs.uptime(host)
    ring = _ring(host, uptime)
    reach = ring[0].age if ring else 0.0
    # The ring may have dropped old lines, and knows nothing of earlier boots: a panic is only there.
    earlier = _journal(host, hours, reach) if reach < window else []
    if ring is None and earlier is None:
        raise Unsupported(
            "kernel log not readable: /dev/kmsg, dmesg and journalctl all refused or absent; probe as root"
        )
    lines = [line for line in (earlier or []) + (ring or []) if line.age <= window]
    if earlier:
        reach = max(reach, earlier[0].age)
    return Log(lines, min(hours, reach / 3600.0))


def parse_ring(text: str, uptime: float) -> List[Line]:
    """`dmesg -r` or `dmesg` output; `uptime` in seconds turns stamps into ages."""
    stamped = []
    for raw in text.splitlines():
        found = _RING_LINE.match(raw)
        if found:
            stamped.append((float(found.group(1)), found.group(2)))
        elif stamped and raw.strip():
            stamped.append((stamped[-1][0], raw.strip()))
        elif raw.strip():
            raise ValueError("dmesg: expected '[seconds] text', got %r" % raw[:80])
    return _aged(stamped, uptime)


def parse_records(text: str, uptime: float) -> List[Line]:
    """/dev/kmsg records, ``priority,sequence,microseconds,flags;text``; indented lines name the device."""
    stamped = []
    for raw in text.splitlines():
        found = _RECORD.match(raw)
        if found:
            stamped.append((int(found.group(1)) / 1e6, found.group(2).replace("\\x0a", " ")))
        elif raw.strip() and not raw.startswith(" "):
            raise ValueError(
                "%s: expected 'priority,sequence,microseconds,flags;text', got %r" % (DEVICE, raw[:80])
            )
    return _aged(stamped, uptime)


def _aged(stamped: List[Tuple[float, str]], uptime: float) -> List[Line]:
    # A container may see its own uptime beside the machine's log: never let an event lie in the future.
    now = max([uptime] + [stamp for stamp, _ in stamped])
    return [Line(now - stamp, words) for stamp, words in stamped]


def parse_journal(text: str, now: float) -> List[Line]:
    """`journalctl -o short-unix` output; `now` in Unix seconds. Lines of other transports are dropped."""
    lines = []
    for raw in text.splitlines():
        if not raw.strip() or raw.startswith("-- "):
            continue
        found = _JOURNAL_LINE.match(raw)
        if found:
            lines.append(Line(max(0.0, now - float(found.group(1))), found.group(2)))
        elif not raw[:1].isdigit() and lines:
            lines.append(Line(lines[-1].age, raw.strip()))
        elif not raw[:1].isdigit():
            raise ValueError("journalctl: expected 'seconds host kernel: text', got %r" % raw[:80])
    return lines


def _ring(host: Host, uptime: float) -> Optional[List[Line]]:
    try:
        return parse_records(host.read(DEVICE, limit=32 << 20), uptime)
    except Unsupported:
        pass  # kernel.dmesg_restrict, or a container without the device: dmesg has another way in.
    try:
        ran = host.run(RING, ok=())
    except Unsupported:
        return None
    return parse_ring(ran.out, uptime) if ran.code == 0 else None


def journal_command(hours: float) -> List[str]:
    since = "--since=-%dmin" % round(hours * 60)
    return ["journalctl", "-q", "--no-pager", "-o", "short-unix", since, "_TRANSPORT=kernel"]


def _journal(host: Host, hours: float, younger: float) -> Optional[List[Line]]:
    """Lines older than the ring reaches; None where there is no journal to read."""
    boot = re.search(r"^btime (\d+)$", host.read_or("/proc/stat"), re.MULTILINE)
    if not boot:
        return None
    now = int(boot.group(1)) + sysfs.uptime(host)
    try:
        ran = host.run(journal_command(hours), ok=())
    except Unsupported:
        return None
    except TimedOut:
        host.note("journalctl did not answer in time: only the kernel's ring buffer was read")
        return None
    if ran.code != 0 or not ran.out.strip():
        return None
    # The seam: the same second may be in both, and half of btime's resolution is rounding.
    return [line for line in parse_journal(ran.out, now) if line.age > younger + 1.0]
