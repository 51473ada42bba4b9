"""Whether the clock is disciplined, and how far off it is: chrony, ntpd or systemd, whichever answers."""

import re
from typing import Iterator, NamedTuple, Optional

from probes.agent.api import Host, Measure, Unsupported
from probes.checks import sysfs


class Discipline(NamedTuple):
    synchronised: bool
    offset: Optional[float]
    """Absolute, in seconds; None where the daemon does not tell."""
    stratum: Optional[int]
    server: str


def time_sync(host: Host) -> Iterator[Measure]:
    """Synchronised or not, offset to the reference in seconds, stratum."""
    silent = []
    for tool, command, parse in (
        ("chrony", ("chronyc", "-n", "tracking"), parse_chrony),
        ("ntpd", ("ntpq", "-n", "-p"), parse_ntpq),
        ("systemd", ("timedatectl",), parse_timedatectl),
    ):
        if not host.which(command[0]):
            continue
        ran = host.run(command, ok=())
        if ran.code != 0 or not ran.out.strip() or "Cannot talk to daemon" in ran.out:
            said = (ran.err.strip() or ran.out.strip() or "no output").splitlines()[-1]
            silent.append("%s: %s" % (command[0], said))
            continue
        state = parse(ran.out)
        if tool == "systemd":
            detail = host.run(("timedatectl", "timesync-status"), ok=())
            state = with_timesync(state, detail.out if detail.code == 0 else "")
        for line in ran.out.strip().splitlines()[:15]:
            host.note(line)
        yield Measure("synchronised", state.synchronised)
        yield Measure("daemon", tool)
        if state.offset is not None:
            yield Measure("offset", state.offset)
        if state.stratum is not None:
            yield Measure("stratum", state.stratum)
        if state.server:
            yield Measure("server", state.server)
        return
    raise Unsupported("no time daemon answers: " + ("; ".join(silent) or "no chronyc, ntpq or timedatectl"))


def parse_chrony(text: str) -> Discipline:
    """`chronyc -n tracking` (chronyc(1), tracking)."""
    values = sysfs.keyed(text)
    offset = re.match(r"([\d.]+) seconds (?:slow|fast)", values.get("System time", ""))
    stratum = values.get("Stratum", "")
    if not offset or not stratum.isdigit() or "Leap status" not in values:
        raise ValueError("chronyc tracking: no System time, Stratum or Leap status in %r" % text[:80])
    server = re.search(r"\((.*)\)", values.get("Reference ID", ""))
    # 7F7F0101 is chronyd's own clock ("local stratum"): it serves time and follows nobody.
    own_clock = values.get("Reference ID", "").startswith("7F7F")
    return Discipline(
        values["Leap status"] != "Not synchronised" and not own_clock,
        float(offset.group(1)),
        int(stratum),
        server.group(1) if server else "",
    )


def parse_ntpq(text: str) -> Discipline:
    """`ntpq -n -p`: the line marked ``*`` is the peer that is followed; offset in milliseconds."""
    if "offset" not in text:
        raise ValueError("ntpq: no column 'offset' in %r" % text[:80])
    for line in text.splitlines():
        if line.startswith(("*", "o")):
            words = line[1:].split()
            if len(words) < 10:
                raise ValueError("ntpq: expected ten columns, got %r" % line[:80])
            return Discipline(True, abs(float(words[8])) / 1000.0, int(words[2]) + 1, words[0])
    return Discipline(False, None, None, "")


def parse_timedatectl(text: str) -> Discipline:
    """`timedatectl`: ``System clock synchronized``, ``NTP synchronized`` before systemd 239."""
    found = re.search(r"^\s*(?:System clock|NTP) synchronized:\s*(yes|no)\s*$", text, re.MULTILINE)
    if not found:
        raise ValueError("timedatectl: no line 'System clock synchronized', got %r" % text[:80])
    return Discipline(found.group(1) == "yes", None, None, "")


def with_timesync(state: Discipline, text: str) -> Discipline:
    """`state` with what `timedatectl timesync-status` adds: offset, stratum, server."""
    values = sysfs.keyed(text)
    offset = re.fullmatch(r"[+-]?([\d.]+)(us|ms|s|min)", values.get("Offset", ""))
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
    stratum = values.get("Stratum", "")
    return state._replace(
        offset=float(offset.group(1)) * scale[offset.group(2)] if offset else None,
        stratum=int(stratum) if stratum.isdigit() else None,
        server=values.get("Server", "").split(" ")[0],
    )
