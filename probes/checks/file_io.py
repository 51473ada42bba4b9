"""Writing and reading files, with every byte compared: local disks, and shared filesystems under a time
limit.

The file has no name (O_TMPFILE), or loses it at once: whatever kills this process, the kernel frees the
space. The page cache is passed by where the filesystem allows it (O_DIRECT), else dropped for this file
alone.
"""

import errno
import hashlib
import mmap
import os
import random
import statistics
import struct
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

from probes.agent.api import Host, Measure, Measures, Unsupported
from probes.checks.children import BROKE, DONE, HUNG, Child, Say, Work, run_children
from probes.checks.storage import mounted

PAGE = 4096
BLOCK = 1 << 20
SHOWN = 4

MEMORY_TYPES = frozenset(["ramfs", "tmpfs", "devtmpfs"])


class File:
    """A nameless file. Tests give one that loses or changes what passes through it."""

    def __init__(self, folder: str, direct: bool = True) -> None:
        self.named = False
        self.descriptor = self._open(folder, direct)

    def _open(self, folder: str, direct: bool) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        self.direct = direct
        for extra in (os.O_TMPFILE | os.O_DIRECT, os.O_TMPFILE) if direct else (os.O_TMPFILE,):
            try:
                descriptor = os.open(folder, flags | extra, 0o600)
                self.direct = bool(extra & os.O_DIRECT)
                return descriptor
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EISDIR, errno.ENOSYS):
                    raise
        # Network filesystems without nameless files: named for the moment between two system calls.
        self.named, self.direct = True, False
        descriptor, path = tempfile.mkstemp(prefix=".ltp-io-", dir=folder)
        os.unlink(path)
        return descriptor

    def write(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.pwrite(self.descriptor, buffer, offset)
            buffer, offset = buffer[count:], offset + count

    def read(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self.descriptor, [buffer], offset)

    def sync(self) -> None:
        os.fdatasync(self.descriptor)

    def forget(self) -> None:
        """Drop this file from the page cache, so that reading it asks the disk."""
        self.sync()
        if not self.direct:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self.descriptor)


Opener = Callable[[str], File]


def io(host: Host, opener: Opener = File) -> Measures:
    """MB/s and operations a second of writes, reads and syncs in each folder, and blocks that came back
    different.

    params: ``paths``: folders (default: the first of ``candidates`` that is not in memory); ``megabytes``,
    at most ``share`` of the free space; ``seconds`` for each random part.
    """
    megabytes = int(host.params.get("megabytes", 64))
    share = float(host.params.get("share", 0.05))
    seconds = float(host.params.get("seconds", 1.0))
    limit = float(host.params.get("limit", 60.0))

    def work(path: str) -> Work:
        def run(say: Say) -> Dict[str, Any]:
            room = os.statvfs(path)
            size = min(megabytes * BLOCK, int(room.f_bavail * room.f_frsize * share)) // BLOCK * BLOCK
            if size < BLOCK:
                raise OSError(errno.ENOSPC, "less than 1 MiB may be used (%g of the free space)" % share)
            return exercise(opener(path), size, seconds, say)

        return run

    paths = [str(path) for path in host.params.get("paths") or ()] or [_first_on_disk(host)]
    children = run_children([(path, work(path)) for path in paths], limit)
    for child in children:
        yield Measure("type", kind_of(host, child.name), child.name)
        yield from _told(host, child)


def shared(host: Host, opener: Opener = File) -> Measures:
    """Whether each shared folder takes, keeps and gives back a small file in time. params: ``paths``;
    ``seconds``."""
    paths = [str(path) for path in host.params.get("paths") or ()]
    if not paths:
        host.note("no shared folder is declared (parameter paths)")
        yield Measure("hung", 0)
        return
    size = int(host.params.get("megabytes", 8)) * BLOCK

    def work(path: str) -> Work:
        def run(say: Say) -> Dict[str, Any]:
            say("open")
            answer = exercise(opener(path), size, 0.0, say)
            return {key: answer[key] for key in ("write_mb_s", "read_mb_s", "mismatches", "notes")}

        return run

    for child in run_children(
        [(path, work(path)) for path in paths], float(host.params.get("seconds", 20.0))
    ):
        yield from _told(host, child)


def exercise(file: File, size: int, seconds: float, say: Say) -> Dict[str, Any]:
    """Write, sync, read and compare; then the same by pages in random order for `seconds` each."""
    try:
        content = Content(size)
        answer: Dict[str, Any] = {
            "mismatches": 0,
            "notes": ["O_DIRECT" if file.direct else "through the page cache"],
        }
        say("sequential write")
        with mmap.mmap(-1, BLOCK) as area, memoryview(area) as buffer:
            spent = 0.0
            for offset in range(0, size, BLOCK):
                buffer[:] = content.block(offset)
                start = time.perf_counter()
                file.write(buffer, offset)
                spent += time.perf_counter() - start
            start = time.perf_counter()
            file.sync()
            answer["write_mb_s"] = size / (spent + time.perf_counter() - start) / 1e6
            say("sequential read")
            file.forget()
            spent = 0.0
            for offset in range(0, size, BLOCK):
                buffer[:] = bytes(BLOCK)
                start = time.perf_counter()
                count = file.read(buffer, offset)
                spent += time.perf_counter() - start
                _compare(answer, content.block(offset), bytes(buffer[:count]), offset)
            answer["read_mb_s"] = size / spent / 1e6
            if seconds:
                _random_pages(file, content, memoryview(buffer)[:PAGE], seconds, answer=answer, say=say)
        return answer
    finally:
        file.close()


class Content:
    """What each page of the file must hold: noise, its own place, how often it was written, and this run's
    number.

    So a page that is stale, or lies where another belongs, differs from what is expected.
    """

    def __init__(self, size: int) -> None:
        self.pages = size // PAGE
        self.run = os.urandom(16)
        self.noise = hashlib.shake_256(self.run).digest(BLOCK)
        self.generation: Dict[int, int] = {}

    def page(self, index: int) -> bytes:
        noise = index * PAGE % BLOCK
        stamp = struct.pack("<QQ16s", index, self.generation.get(index, 0), self.run)
        return stamp + self.noise[noise + len(stamp) : noise + PAGE]

    def block(self, offset: int) -> bytes:
        first = offset // PAGE
        return b"".join(self.page(first + i) for i in range(BLOCK // PAGE))


class Difference(NamedTuple):
    offset: int
    expected: int
    read: int
    pages: int

    @property
    def words(self) -> str:
        bits = self.expected ^ self.read
        return (
            "offset 0x%x: wrote 0x%016x, read 0x%016x, bits 0x%x differ; %d pages in this block are wrong"
            % (
                self.offset,
                self.expected,
                self.read,
                bits,
                self.pages,
            )
        )


def first_difference(expected: bytes, got: bytes, offset: int) -> Difference:
    """The first differing 8 bytes, and how many pages differ. `got` may be short."""
    got = got.ljust(len(expected), b"\0")
    pages = sum(expected[i : i + PAGE] != got[i : i + PAGE] for i in range(0, len(expected), PAGE))
    at = next(i for i in range(0, len(expected), 8) if expected[i : i + 8] != got[i : i + 8])
    wrote, read = (int.from_bytes(data[at : at + 8], "little") for data in (expected, got))
    return Difference(offset + at, wrote, read, pages)


def kind_of(host: Host, path: str) -> str:
    """The type of the filesystem that `path` is on, as mountinfo has it."""
    path = os.path.realpath(path)
    best, kind = "", "unknown"
    for mount in mounted(host):
        inside = mount.point in ("/", path) or path.startswith(mount.point + "/")
        if inside and len(mount.point) >= len(best):
            best, kind = mount.point, mount.kind
    return kind


def _first_on_disk(host: Host) -> str:
    candidates = [str(path) for path in host.params.get("candidates") or ("/var/tmp", "/tmp")]
    usable = [path for path in candidates if os.path.isdir(path) and os.access(path, os.W_OK)]
    for path in usable:
        if kind_of(host, path) not in MEMORY_TYPES:
            return path
    raise Unsupported(
        "%s: no folder there is on a disk and writable; name one by the parameter paths"
        % ", ".join(candidates)
    )


def _random_pages(
    file: File, content: Content, page: memoryview, seconds: float, *, answer: Dict[str, Any], say: Say
) -> None:
    pages = content.pages
    order = random.Random(5)
    say("random write")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        index = order.randrange(pages)
        content.generation[index] = content.generation.get(index, 0) + 1
        page[:] = content.page(index)
        file.write(page, index * PAGE)
        count += 1
    file.sync()
    answer["random_write_iops"] = count / (time.perf_counter() - start)
    say("sync")
    delays: List[float] = []
    start = time.perf_counter()
    while len(delays) < 200 and (not delays or time.perf_counter() - start < seconds):
        index = order.randrange(pages)
        content.generation[index] = content.generation.get(index, 0) + 1
        page[:] = content.page(index)
        file.write(page, index * PAGE)
        before = time.perf_counter()
        file.sync()
        delays.append(time.perf_counter() - before)
    answer["fsync_ms"] = statistics.median(delays) * 1e3
    answer["fsync_slowest_ms"] = max(delays) * 1e3
    say("random read")
    file.forget()
    count, spent, start = 0, 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        index = order.randrange(pages)
        page[:] = bytes(PAGE)
        before = time.perf_counter()
        got = file.read(page, index * PAGE)
        spent += time.perf_counter() - before
        _compare(answer, content.page(index), bytes(page[:got]), index * PAGE)
        count += 1
    answer["random_read_iops"] = count / spent


def _compare(answer: Dict[str, Any], expected: bytes, got: bytes, offset: int) -> None:
    if got == expected:
        return
    difference = first_difference(expected, got, offset)
    answer["mismatches"] += difference.pages
    if len(answer["notes"]) <= SHOWN:
        answer["notes"].append(difference.words)


def _told(host: Host, child: Child) -> Iterator[Measure]:
    if child.ending == BROKE:
        raise ValueError(child.words)
    yield Measure("hung", int(child.ending == HUNG), child.name)
    yield Measure("failed", int(child.ending not in (DONE, HUNG)), child.name)
    if child.ending != DONE:
        host.note(child.words)
        return
    for line in child.result.pop("notes"):
        host.note("%s: %s" % (child.name, line))
    for metric, value in child.result.items():
        yield Measure(metric, value, child.name)
