"""Filesystems and drives of this node: room, read-only remounts, mounts that hang, drives that wear out.

Whatever may block for ever is asked in a child that is left behind when its time is over.
"""

import os
import time
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from probes.agent.api import Host, Measure, Measures, Unsupported
from probes.checks.children import BROKE, DONE, FAILED, HUNG, Child, Say, Work, run_children

NETWORK_TYPES = frozenset(
    (
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "daos",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "smb3",
        "virtiofs",
        "wekafs",
    )
)
LOCAL_TYPES = frozenset(
    (
        "bcachefs",
        "btrfs",
        "exfat",
        "ext2",
        "ext3",
        "ext4",
        "f2fs",
        "jfs",
        "tmpfs",
        "vfat",
        "xfs",
        "zfs",
    )
)
ALWAYS_READ_ONLY = frozenset(["cramfs", "erofs", "iso9660", "romfs", "squashfs", "udf"])
PRIVATE_FUSE = frozenset(["fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "fuse.snapfuse"])
"""Mounts of desktops and containers, which answer only to their owner or hold no data."""
PRIVATE_FOLDERS = (
    "/proc",
    "/sys",
    "/run",
    "/snap",
    "/var/lib/docker",
    "/var/lib/containers",
    "/var/lib/kubelet",
)

STATFS_SECONDS = 5.0


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    point: str
    device: str
    """``major:minor``."""
    root: str
    kind: str
    source: str
    options: Tuple[str, ...]
    super_options: Tuple[str, ...]

    @property
    def network(self) -> bool:
        return self.kind in NETWORK_TYPES or (self.kind.startswith("fuse.") and self.kind not in PRIVATE_FUSE)

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options or self.given_up

    @property
    def given_up(self) -> bool:
        """The kernel stopped all writes after an error; newer ones say so instead of turning ro."""
        return bool({"emergency_ro", "shutdown"} & set(self.super_options))


class Room(NamedTuple):
    """What statfs says, in bytes and inodes; zero inodes: the filesystem has no fixed number."""

    size: int
    used: int
    available: int
    inodes: int
    inodes_free: int
    seconds: float


def space(host: Host) -> Measures:
    """Percent used, as df shows it (what is reserved for root counts as used), and GB left, by mount."""
    yield from _filled(host, "used_percent", "free_gb")


def inodes(host: Host) -> Measures:
    """Percent of the inodes in use, by mount; filesystems without a fixed number are left out."""
    yield from _filled(host, "used_percent", "")


def hang(host: Host) -> Measures:
    """Whether statfs on each mount answers, in time and without an error.

    params: ``seconds`` that it may take.
    """
    limit = float(host.params.get("seconds", STATFS_SECONDS))
    for point, child in _statfs(host, worth_asking(mounted(host)), limit).items():
        yield Measure("hung", int(child.ending == HUNG), point)
        yield Measure("broken", int(child.ending == FAILED), point)
        if child.ending == DONE:
            yield Measure("statfs_ms", Room(*child.result).seconds * 1e3, point)
        else:
            host.note("%s (%s)" % (child.words, point))


def readonly(host: Host) -> Measures:
    """Mounts that take no writes though they should: the kernel gave up on the filesystem, or fstab says
    rw."""
    declared = {entry.point: entry for entry in fstab(host.read_or("/etc/fstab"))}
    seen = False
    for mount in worth_asking(mounted(host)):
        reason = why_wrongly_read_only(mount, declared.get(mount.point))
        if reason:
            host.note("%s: %s" % (mount.point, reason))
        seen = True
        yield Measure("readonly", int(bool(reason)), mount.point)
    if not seen:
        raise Unsupported("no filesystem that takes writes is mounted")


def mounts(host: Host) -> Measures:
    """Mounts that fstab or the inventory declares and that are not there as declared.

    params: ``mounts``: mount point -> {type, source, options}, each optional.
    """
    now = {mount.point: mount for mount in mounted(host)}
    wanted = {entry.point: Declared(entry.point, "", "", ()) for entry in fstab(host.read_or("/etc/fstab"))}
    wanted.update(declared_by(host.params.get("mounts") or {}))
    for point, declared in sorted(wanted.items()):
        reason = why_not_as_declared(now.get(point), declared)
        if reason:
            host.note("%s: %s" % (point, reason))
        yield Measure("missing", int(bool(reason)), point)
    if not wanted:
        host.note("neither /etc/fstab nor the inventory declares a mount")
        yield Measure("missing", 0)


class Declared(NamedTuple):
    """What a mount should be; empty fields are not compared."""

    point: str
    kind: str
    source: str
    options: Tuple[str, ...]


def parse_mountinfo(text: str) -> List[Mount]:
    """Lines of mountinfo (proc_pid_mountinfo(5)). ValueError for a line that is not one."""
    found = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if not dash or len(left) < 6 or len(right) < 2:
            raise ValueError("not a line of mountinfo: %.100r" % line)
        found.append(
            Mount(
                point=_unescaped(left[4]),
                device=left[2],
                root=_unescaped(left[3]),
                kind=right[0],
                source=_unescaped(right[1]),
                options=tuple(left[5].split(",")),
                super_options=tuple(right[2].split(",")) if len(right) > 2 else (),
            )
        )
    return found


def fstab(text: str) -> List[Declared]:
    """Filesystems that fstab(5) wants mounted at boot: without swap, ``noauto``, ``nofail`` and
    automounts."""
    found = []
    for line in text.splitlines():
        fields = line.split("#")[0].split()
        if len(fields) < 3 or not fields[1].startswith("/"):
            continue
        options = tuple(fields[3].split(",")) if len(fields) > 3 else ()
        if fields[2] in ("swap", "proc", "sysfs") or {"noauto", "nofail", "x-systemd.automount"} & set(
            options
        ):
            continue
        point = _unescaped(fields[1]).rstrip("/") or "/"
        found.append(Declared(point, fields[2], _unescaped(fields[0]), options))
    return found


def declared_by(params: object) -> Dict[str, Declared]:
    """Mounts as the parameter ``mounts`` gives them. ValueError when it is not a mapping of mappings."""
    if not isinstance(params, Mapping):
        raise ValueError("the parameter mounts must map each mount point to its type, source and options")
    found = {}
    for point, given in params.items():
        wanted = {} if given is None else given
        if not isinstance(wanted, Mapping):
            raise ValueError("the parameter mounts: %s must map to type, source and options" % point)
        options = wanted.get("options") or ()
        options = options.split(",") if isinstance(options, str) else options
        found[str(point)] = Declared(
            str(point),
            str(wanted.get("type") or ""),
            str(wanted.get("source") or ""),
            tuple(map(str, options)),
        )
    return found


def why_not_as_declared(mount: Optional[Mount], declared: Declared) -> str:
    """Empty when the mount is as declared."""
    if mount is None:
        return "not mounted"
    if declared.kind and mount.kind != declared.kind:
        return "mounted as %s, declared as %s" % (mount.kind, declared.kind)
    if declared.source and mount.source != declared.source:
        return "mounted from %s, declared from %s" % (mount.source, declared.source)
    has = set(mount.options) | set(mount.super_options)
    if "ro" in has:
        has.discard("rw")
    lacking = [option for option in declared.options if option not in has]
    return "lacks the option " + ", ".join(lacking) if lacking else ""


def why_wrongly_read_only(mount: Mount, declared: Optional[Declared]) -> str:
    """Empty when the mount takes writes, or was never meant to."""
    if not mount.read_only or mount.kind in ALWAYS_READ_ONLY:
        return ""
    if mount.given_up:
        return "shut down by the kernel after an error"
    if "ro" in mount.super_options and "ro" not in mount.options:
        # A person's `mount -o ro` and `remount,ro` set both; only the filesystem itself sets just its own.
        return "mounted rw, but the filesystem has turned read-only, as it does after an error"
    if declared is not None and "ro" not in declared.options:
        return "read-only, though /etc/fstab says otherwise"
    return ""


def worth_asking(mounts: Sequence[Mount]) -> List[Mount]:
    """Filesystems that hold data: local and network ones, each once, the first mount of each device.

    A mount hidden by a later one on the same point is left out: no path leads to it.
    """
    visible = {mount.point: mount for mount in mounts}
    seen: Set[str] = set()
    found = []
    for mount in mounts:
        if visible[mount.point] is not mount or mount.device in seen:
            continue
        data = mount.network or mount.kind in LOCAL_TYPES or (mount.kind == "overlay" and mount.point == "/")
        private = (
            mount.point.startswith(tuple(folder + "/" for folder in PRIVATE_FOLDERS))
            or mount.point in PRIVATE_FOLDERS
        )
        if data and (mount.network or not private):
            seen.add(mount.device)
            found.append(mount)
    return found


def mounted(host: Host) -> List[Mount]:
    return parse_mountinfo(host.read("/proc/self/mountinfo"))


def percent_used(used: int, available: int) -> float:
    """As df computes it."""
    return 100.0 * used / (used + available) if used + available else 100.0


_answers: Dict[Tuple[str, str], Child] = {}


def _statfs(host: Host, wanted: Sequence[Mount], seconds: float) -> Dict[str, Child]:
    """statfs of each mount point, in a child each. One that hung is not asked a second time in this
    process."""

    def ask(path: str) -> Work:
        def run(say: Say) -> Tuple[float, ...]:
            start = time.perf_counter()
            v = os.statvfs(path)
            size = v.f_frsize
            used = (v.f_blocks - v.f_bfree) * size
            taken = time.perf_counter() - start
            return (v.f_blocks * size, used, v.f_bavail * size, v.f_files, v.f_ffree, taken)

        return run

    new = [m.point for m in wanted if (host.root, m.point) not in _answers]
    for child in run_children([(point, ask(host.root + point)) for point in new], seconds):
        if child.ending == BROKE:
            raise ValueError(child.words)
        _answers[host.root, child.name] = child
    return {mount.point: _answers[host.root, mount.point] for mount in wanted}


def _filled(host: Host, percent: str, left: str) -> Measures:
    limit = float(host.params.get("seconds", STATFS_SECONDS))
    wanted = [mount for mount in worth_asking(mounted(host)) if not mount.read_only]
    seen = False
    for point, child in _statfs(host, wanted, limit).items():
        if child.ending != DONE:
            host.note("no statfs: " + child.words)
            seen = True
            yield Measure(percent, None, point)
            continue
        room = Room(*child.result)
        if left and room.size:
            seen = True
            yield Measure(percent, percent_used(room.used, room.available), point)
            yield Measure(left, room.available / 1e9, point)
        elif not left and room.inodes:
            seen = True
            yield Measure(percent, percent_used(room.inodes - room.inodes_free, room.inodes_free), point)
    if not seen:
        raise Unsupported("no filesystem that takes writes is mounted")


def _unescaped(text: str) -> str:
    """The kernel writes blank, tab, newline and backslash as three octal digits."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, character)
    return text
