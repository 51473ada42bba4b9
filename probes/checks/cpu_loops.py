"""What a CPU does with the standard library alone: integer loops, copies, and arithmetic whose answer is
known."""

import ctypes
import hashlib
import math
import mmap
import os
import struct
import threading
import time
import zlib
from typing import Any, Callable, List, Sequence

from probes.checks.children import DONE, Say, run_children

KNOWN_ANSWER = "32c12aa40e4ad3034f47345a51387f39472d76ac367881fd00a6ba7e0d61f86a"
"""known_work(1) on every sound machine."""


def known_work(rounds: int = 1) -> str:
    """Digest of arithmetic that IEEE 754 and the integers define to the last bit: the same on every machine.

    Only + - * / and the square root: these are correctly rounded everywhere; sin and exp are not.
    """
    digest = hashlib.sha256()
    for _ in range(rounds):
        state, x = 0x9E3779B97F4A7C15, 1.5
        floats = []
        for i in range(1, 4001):
            state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
            x = math.sqrt(x * 1.25 + (state >> 40) / 16777216.0) + 1.0 / i
            floats.append(x)
        block = struct.pack("<4000d", *floats) * 8
        digest.update(block)
        digest.update(struct.pack("<QIQ", state, zlib.crc32(block), pow(state | 1, 65537, (1 << 61) - 1)))
    return digest.hexdigest()


def wrong_cpus(cpus: Sequence[int], rounds: int, work: Callable[[int], str] = known_work) -> List[int]:
    """CPUs on which `work` gives another digest than the known one, or none. All at once, one process a
    CPU."""

    def pinned(cpu: int) -> Callable[[Say], bool]:
        def run(say: Say) -> bool:
            os.sched_setaffinity(0, {cpu})
            return all(work(1) == KNOWN_ANSWER for _ in range(rounds))

        return run

    children = run_children([("cpu %d" % cpu, pinned(cpu)) for cpu in cpus], timeout=60.0)
    return [cpu for cpu, child in zip(cpus, children) if not (child.ending == DONE and child.result)]


def loop_rates(cpus: Sequence[int], seconds: float) -> List[float]:
    """Operations a second of an interpreted integer and float loop, for each CPU, all at once."""

    def pinned(cpu: int) -> Callable[[Say], float]:
        def run(say: Say) -> float:
            os.sched_setaffinity(0, {cpu})
            return _loop(seconds)

        return run

    children = run_children([("cpu %d" % cpu, pinned(cpu)) for cpu in cpus], timeout=seconds + 30.0)
    lost = [child.words for child in children if child.ending != DONE]
    if lost:
        raise ValueError(lost[0])
    return [float(child.result) for child in children]


def _loop(seconds: float) -> float:
    state, x, done = 12345, 1.0, 0
    start = time.perf_counter()
    while True:
        for _ in range(2000):
            state = (state * 1103515245 + 12345) & 0x7FFFFFFF
            x = x * 0.5 + state
        done += 2000 * 5
        passed = time.perf_counter() - start
        if passed >= seconds:
            return done / passed


def copy_bandwidth(threads: int, size: int, seconds: float) -> float:
    """Bytes a second, read and written, that `threads` copying `size` bytes in all move together."""
    share = max(1 << 20, size // threads)
    libc = ctypes.CDLL(None)  # its calls let other threads run, unlike a slice assignment
    moved = [0.0] * threads
    gate = threading.Barrier(threads)

    def copy(index: int) -> None:
        with mmap.mmap(-1, share) as a, mmap.mmap(-1, share) as b:
            source = (ctypes.c_char * share).from_buffer(a)
            target = (ctypes.c_char * share).from_buffer(b)
            try:
                moved[index] = _copy_for(libc, target, source, share, seconds=seconds, gate=gate)
            finally:
                del source, target

    workers = [threading.Thread(target=copy, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(moved)


def _copy_for(
    libc: Any, target: Any, source: Any, share: int, *, seconds: float, gate: threading.Barrier
) -> float:
    ctypes.memset(source, 1, share)
    libc.memcpy(target, source, ctypes.c_size_t(share))  # the first touch makes the pages
    gate.wait()
    start, count = time.perf_counter(), 0
    while True:
        libc.memcpy(target, source, ctypes.c_size_t(share))
        count += 1
        passed = time.perf_counter() - start
        if passed >= seconds:
            return 2.0 * share * count / passed
