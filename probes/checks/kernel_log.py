"""The kernel's own log, neither cleared nor waited for: the ring buffer, and the journal for what it lost.

Ages are seconds before now. "Now" is boot time plus uptime, both from /proc, so a wrong wall clock does not
move events of this boot, and captures replay to the same result. The ring knows this boot alone; in the
journal, journalctl itself marks where the boot id changes, so that no clock tells boots apart.
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
_BOOT_MARK = re.compile(r"^-- (?:Boot [0-9a-f]{32}|Reboot) --$")
"""Between the lines of two boots; `Reboot` before systemd 246."""


class Line(NamedTuple):
    age: float
    """Seconds before now."""
    text: str
    boot: int = 0
    """0: this boot; -1: the one before it; and so on, among the boots that left lines in the window."""


class Log(NamedTuple):
    lines: List[Line]
    """Oldest first, all within the window."""
    hours: float
    """How far back the lines reach without a gap, at most the window."""
    earlier_boots: bool
    """Whether what earlier boots logged within the window is known: there was none, or it was kept."""


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
        reach = max(reach, *(line.age for line in earlier))
    known = uptime >= window or any(line.boot < 0 for line in earlier or [])
    return Log(lines, min(hours, reach / 3600.0), known)


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


def parse_journal(text: str, now: float, uptime: float) -> List[Line]:
    """`journalctl -o short-unix` output with its marks between boots; lines of other transports are dropped.

    `now` in Unix seconds, `uptime` in seconds.
    """
    boots: List[List[Line]] = [[]]
    for raw in text.splitlines():
        if _BOOT_MARK.match(raw):
            boots.append([])
        if not raw.strip() or raw.startswith("-- "):
            continue
        found = _JOURNAL_LINE.match(raw)
        current = boots[-1]
        if found:
            current.append(Line(max(0.0, now - float(found.group(1))), found.group(2)))
        elif not raw[:1].isdigit() and current:
            current.append(Line(current[-1].age, raw.strip()))
        elif not raw[:1].isdigit():
            raise ValueError("journalctl: expected 'seconds host kernel: text', got %r" % raw[:80])
    boots = [lines for lines in boots if lines]
    # Where this boot left no lines in the journal, the last that did is an earlier one. A second of slack:
    # boot time is known in whole seconds.
    newest = 0 if boots and min(line.age for line in boots[-1]) <= uptime + 1.0 else -1
    return [
        line._replace(boot=newest - (len(boots) - 1 - place))
        for place, lines in enumerate(boots)
        for line in lines
    ]


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
    # Not -q: it silences the marks between boots too.
    return ["journalctl", "--no-pager", "-o", "short-unix", since, "_TRANSPORT=kernel"]


def _journal(host: Host, hours: float, younger: float) -> Optional[List[Line]]:
    """Lines of earlier boots, and those of this one that the ring no longer has; None without a journal."""
    boot = re.search(r"^btime (\d+)$", host.read_or("/proc/stat"), re.MULTILINE)
    if not boot:
        return None
    uptime = sysfs.uptime(host)
    try:
        ran = host.run(journal_command(hours), ok=())
    except Unsupported:
        return None
    except TimedOut:
        host.note("journalctl did not answer in time: only the kernel's ring buffer was read")
        return None
    lines = parse_journal(ran.out, int(boot.group(1)) + uptime, uptime) if ran.code == 0 else []
    # No kernel at all in a day of journal: it is not kept, or kept from us. That is not "nothing happened".
    if not lines:
        return None
    # The seam: the same second may be in both, and half of btime's resolution is rounding.
    return [line for line in lines if line.boot < 0 or line.age > younger + 1.0]
