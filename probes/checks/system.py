"""The software of a node: versions, firmware, kernel options, modules, packages, services, containers."""

import fnmatch
import re
from typing import Callable, Dict, Iterator, List, Tuple

from probes.agent.api import Host, Measure, TimedOut, Unsupported
from probes.checks import sysfs

DMI = "/sys/class/dmi/id"
PER_MACHINE_OPTIONS = (
    "BOOT_IMAGE",
    "root",
    "initrd",
    "resume",
    "UUID",
    "rd.luks.uuid",
    "rd.lvm.lv",
    "ip",
    "hostname",
)
"""Kernel options that name this machine's own disk or address: they differ between equal nodes."""


def versions(host: Host) -> Iterator[Measure]:
    """Kernel, distribution, kernel command line (its machine-specific words left out), cgroup version."""
    yield Measure("kernel", host.read("/proc/sys/kernel/osrelease").strip())
    release = sysfs.keyed(host.read_or("/etc/os-release") or host.read_or("/usr/lib/os-release"), "=")
    if release:
        names = [release.get(key, "").strip("\"'") for key in ("ID", "VERSION_ID")]
        yield Measure("os", " ".join(name for name in names if name))
    options = host.read_or("/proc/cmdline").split()
    yield Measure("options", " ".join(o for o in options if o.split("=", 1)[0] not in PER_MACHINE_OPTIONS))
    if host.glob("/sys/fs/cgroup/cgroup.controllers"):
        yield Measure("cgroup", "v2")
    elif host.glob("/sys/fs/cgroup/*"):
        yield Measure("cgroup", "hybrid" if host.glob("/sys/fs/cgroup/unified") else "v1")
    waiting = host.glob("/var/run/reboot-required") or host.glob("/run/reboot-required")
    yield Measure("reboot_required", bool(waiting))


def firmware(host: Host) -> Iterator[Measure]:
    """Board, product and firmware versions, as SMBIOS gives them."""
    found = False
    for metric in (
        "sys_vendor",
        "product_name",
        "board_name",
        "bios_vendor",
        "bios_version",
        "bios_date",
        "bios_release",
    ):
        value = " ".join(host.read_or("%s/%s" % (DMI, metric)).split())
        if value:
            found = True
            yield Measure(metric, value)
    if not found:
        raise Unsupported("no SMBIOS data under %s (usual on small virtual machines)" % DMI)


def uptime(host: Host) -> Iterator[Measure]:
    """Seconds since boot."""
    yield Measure("seconds", round(sysfs.uptime(host), 1))


def kernel_options(host: Host) -> Iterator[Measure]:
    """Kernel options that must, or must not, be set (parameters `required`, `forbidden`)."""
    options = set(host.read("/proc/cmdline").split())
    yield from _declared(host, lambda wanted: wanted in options)


def modules(host: Host) -> Iterator[Measure]:
    """Kernel modules that must, or must not, be loaded (parameters `required`, `forbidden`)."""
    # Without the file the kernel knows no modules: all that it has is built in.
    loaded = {line.split()[0] for line in host.read_or("/proc/modules").splitlines() if line.strip()}

    def present(wanted: str) -> bool:
        name = wanted.replace("-", "_")
        # A driver built into the kernel is not in /proc/modules.
        return name in loaded or bool(host.glob("/sys/module/" + name))

    yield from _declared(host, present)
    yield Measure("loaded", len(loaded))


def _declared(host: Host, present: Callable[[str], bool]) -> Iterator[Measure]:
    required = sysfs.strings(host.params.get("required"), "required")
    forbidden = sysfs.strings(host.params.get("forbidden"), "forbidden")
    missing = [name for name in required if not present(name)]
    unwanted = [name for name in forbidden if present(name)]
    for name in missing:
        host.note("missing: " + name)
    for name in unwanted:
        host.note("present though forbidden: " + name)
    yield Measure("declared", len(required) + len(forbidden))
    yield Measure("missing", len(missing))
    yield Measure("forbidden", len(unwanted))


def packages(host: Host) -> Iterator[Measure]:
    """Versions of the packages that parameter `packages` names (name -> version, or null for any)."""
    declared = host.params.get("packages") or {}
    wanted: Dict[str, object] = dict(declared) if isinstance(declared, dict) else dict.fromkeys(declared)
    installed = _installed(host, sorted(wanted)) if wanted else {}
    missing = sorted(set(wanted) - set(installed))
    different = [
        name
        for name in installed
        if wanted.get(name) is not None and not _version_is(installed[name], str(wanted[name]))
    ]
    for name in sorted(installed):
        yield Measure("version", installed[name], name)
    for name in missing:
        host.note("not installed: " + name)
    for name in different:
        host.note("%s is %s, declared %s" % (name, installed[name], wanted[name]))
    yield Measure("declared", len(wanted))
    yield Measure("missing", len(missing))
    yield Measure("different", len(different))


def _version_is(installed: str, declared: str) -> bool:
    """``550.54`` declares every packaging of that version: ``1:550.54-0ubuntu1`` too."""
    bare = installed.split(":", 1)[-1]
    return fnmatch.fnmatchcase(installed, declared) or bare == declared or bare.rsplit("-", 1)[0] == declared


def _installed(host: Host, names: List[str]) -> Dict[str, str]:
    if host.which("dpkg-query"):
        form = "${db:Status-Abbrev} ${Package} ${Version}\\n"
        return parse_dpkg(host.run(["dpkg-query", "-W", "-f", form, *names], ok=()).out)
    if host.which("rpm"):
        return parse_rpm(
            host.run(["rpm", "-q", "--qf", "%{NAME} %{VERSION}-%{RELEASE}\\n", *names], ok=()).out
        )
    raise Unsupported("neither dpkg-query nor rpm: installed packages cannot be listed")


def parse_dpkg(text: str) -> Dict[str, str]:
    """`dpkg-query -W` with status, name, version; removed packages that left their configuration are out."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise ValueError("dpkg-query: expected 'status name version', got %r" % text[:80])
    return {row[1]: row[2] for row in rows if row[0].startswith("ii") and len(row) > 2}


def parse_rpm(text: str) -> Dict[str, str]:
    """`rpm -q` with name and version-release; ``package X is not installed`` lines are out."""
    rows = [
        line.split() for line in text.splitlines() if line.strip() and not line.endswith("is not installed")
    ]
    if any(len(row) != 2 for row in rows):
        raise ValueError("rpm: expected 'name version', got %r" % text[:80])
    return {row[0]: row[1] for row in rows}


def services(host: Host) -> Iterator[Measure]:
    """Failed systemd units, those that match parameter `important` apart; units that must be active."""
    ran = host.run(
        ("systemctl", "list-units", "--state=failed", "--all", "--plain", "--no-legend", "--no-pager"), ok=()
    )
    if ran.code != 0:
        raise Unsupported("systemd does not answer: " + (ran.err.strip().splitlines() or ["no message"])[0])
    failed = [line.split()[0] for line in ran.out.splitlines() if line.strip()]
    patterns = sysfs.strings(host.params.get("important"), "important")
    important = [unit for unit in failed if any(fnmatch.fnmatchcase(unit, pattern) for pattern in patterns)]
    for unit in failed:
        host.note("failed: " + unit)
    yield Measure("failed", len(failed))
    yield Measure("important_failed", len(important))
    active = sysfs.strings(host.params.get("active"), "active")
    inactive = []
    if active:
        states = host.run(("systemctl", "is-active", "--", *active), ok=()).out.split()
        if len(states) != len(active):
            raise ValueError("systemctl is-active: %d answers for %d units" % (len(states), len(active)))
        inactive = [(unit, state) for unit, state in zip(active, states) if state != "active"]
        for unit, state in inactive:
            host.note("%s is %s" % (unit, state))
    yield Measure("inactive", len(inactive))


RUNTIMES = {
    "docker": (
        ("/var/run/docker.sock", "/run/docker.sock"),
        ("docker", "version", "--format", "{{.Server.Version}}"),
    ),
    "containerd": (("/run/containerd/containerd.sock",), ("ctr", "--timeout", "5s", "version")),
    "podman": ((), ("podman", "--version")),
}
"""Runtime -> its daemon's sockets (none: no daemon), and a command that it answers with its version."""


def containers(host: Host) -> Iterator[Measure]:
    """Whether each container runtime that is set up answers; those that parameter `required` names must."""
    required = sysfs.strings(host.params.get("required"), "required")
    answering = []
    seen = False
    for name, (sockets, command) in RUNTIMES.items():
        if not host.which(command[0]):
            continue
        if sockets and not any(host.glob(path) for path in sockets):
            host.note("%s: the client is installed, its daemon's socket is absent" % name)
            continue
        seen = True
        answer, said = _version(host, command)
        yield Measure("answers", bool(answer), name)
        if answer:
            answering.append(name)
            yield Measure("version", answer, name)
        else:
            host.note("%s: %s" % (name, said))
    missing = [name for name in required if name not in answering]
    if not seen and not required:
        raise Unsupported("no container runtime is set up (docker, containerd, podman)")
    yield Measure("missing", len(missing))


def _version(host: Host, command: Tuple[str, ...]) -> Tuple[str, str]:
    """The last version printed (a client comes before its server), or "" and what was said instead."""
    try:
        ran = host.run(command, timeout=8.0, ok=())
    except TimedOut as late:
        return "", "no answer: %s" % late
    found = re.findall(r"\bv?(\d+\.\d+[\w.+~-]*)", ran.out)
    words = (ran.err.strip() or ran.out.strip() or "no output").splitlines()[-1]
    return (found[-1], "") if ran.code == 0 and found else ("", words)


def container_start(host: Host) -> Iterator[Measure]:
    """Start one container of a local image and remove it again. Only with parameter `image`.

    Parameters: `image`; `command`, a list; `options`, more of `docker run`, such as ``--gpus=all`` or
    ``--device=/dev/kfd``; `runtime`, docker or podman. The image is never pulled.
    """
    image = host.params.get("image")
    if not image:
        raise Unsupported("no image is declared (parameter image): no container was started")
    runtime = str(host.params.get("runtime", "docker"))
    name = "ltpctl-probe-%s" % sysfs.boot_id(host)
    options = sysfs.strings(host.params.get("options"), "options")
    command = sysfs.strings(host.params.get("command"), "command")
    argv = [
        runtime,
        "run",
        "--rm",
        "--pull=never",
        "--network=none",
        "--name",
        name,
        *options,
        str(image),
        *command,
    ]
    try:
        ran = host.run(argv, timeout=float(host.params.get("seconds", 60)), ok=())
    except TimedOut:
        # Killing the client leaves the container running.
        host.run((runtime, "rm", "-f", name), ok=())
        raise
    for line in (ran.err + "\n" + ran.out).strip().splitlines()[-10:]:
        host.note(line)
    yield Measure("exit_status", ran.code)


def iommu(host: Host) -> Iterator[Measure]:
    """IOMMU mode, and PCI bridges whose access control sends peer-to-peer traffic up to the root complex."""
    groups = host.glob("/sys/kernel/iommu_groups/[0-9]*")
    yield Measure("groups", len(groups))
    kinds = sorted({host.read_or(group + "/type") for group in groups} - {""})
    yield Measure("mode", ", ".join(kinds) if kinds else ("on" if groups else "off"))
    if not host.which("lspci"):
        host.note("lspci is not installed: access control of the PCI bridges was not read")
        return
    listing = host.run(("lspci", "-vvv"), ok=()).out
    redirecting, readable = parse_acs(listing)
    if not readable:
        host.note("lspci shows no access control capabilities (needs root)")
        return
    yield Measure("redirecting_bridges", len(redirecting))
    for address in redirecting:
        host.note("ACS request redirect is on: " + address)


def parse_acs(text: str) -> Tuple[List[str], bool]:
    """Bridges of `lspci -vvv` with ``ReqRedir+`` in ACSCtl, and whether capabilities could be read."""
    redirecting = []
    bridge = ""
    for line in text.splitlines():
        header = re.match(r"^((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) (.*)$", line)
        if header:
            bridge = header.group(1) if "PCI bridge" in header.group(2) else ""
        elif bridge and "ACSCtl:" in line and "ReqRedir+" in line:
            redirecting.append(bridge)
    return redirecting, bool(re.search(r"^\s+Capabilities: \[", text, re.MULTILINE))
