"""Collectives inside the node: one process a device (two on a CPU), bandwidth, and every element of the
result.

The ranks are forks of this process and meet at a store on loopback, so nothing is imported by path and no
file is left. A rank that is lost or silent is named with what it was doing.
"""

import contextlib
import datetime
import os
import statistics
import time
from typing import Any, Callable, Dict, List, Tuple

from probes.agent.api import Host, Measure, Measures, TimedOut, Unsupported
from probes.checks.children import BROKE, DONE, HUNG, Child, Say, Work, run_children
from probes.checks.torch_devices import Device, Found, Under, backend, enter_device, find, unmeasured

Collective = Callable[[Any, Any, int, int], Tuple[Callable[[], Any], Callable[[], int]]]
"""(torch, device, elements, world size) -> the operation, and a count of wrong elements after it."""


def node_allreduce(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """Bus bandwidth in GB/s of a sum over all devices, at the largest size, and latency at the smallest.

    Bus bandwidth is bytes / time * 2 (n-1)/n, as nccl-tests' PERFORMANCE.md defines it.
    params: ``sizes`` in bytes (``cpu_sizes`` without devices); ``repeats``; ``limit`` in seconds; ``ranks``
    on a CPU.
    """
    return _collective(host, under, _allreduce, lambda n: 2.0 * (n - 1) / n)


def node_alltoall(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """As `node_allreduce`, each device sending a different part to every other: bytes / time * (n-1)/n."""
    return _collective(host, under, _alltoall, lambda n: (n - 1) / n)


def _collective(
    host: Host, under: Under, collective: Collective, share_on_bus: Callable[[int], float]
) -> Measures:
    found = find(host)
    if found.torch is None:
        raise Unsupported(found.lacking)
    if found.present and not found.devices:
        raise Unsupported(found.lacking)
    if found.devices == 1:
        raise Unsupported("one device: nothing to collect from on this node")
    ranks = found.devices or int(host.params.get("ranks", 2))
    on_cpu = not found.devices
    sizes = [int(size) for size in host.params.get("cpu_sizes" if on_cpu else "sizes") or (4096, 1 << 24)]
    repeats = int(host.params.get("repeats", 5))
    store_port = _Promise()
    limit = float(host.params.get("limit", 60.0))

    def rank_work(rank: int) -> Work:
        def run(say: Say) -> Dict[str, Any]:
            say("device start")
            device = enter_device(found, rank)
            found.torch.set_num_threads(1)
            say("rendezvous")
            with _group(found, rank, ranks, store_port, limit + 30.0) as distributed, under():
                return _measure(device, distributed, collective, sizes, ranks=ranks, repeats=repeats, say=say)

        return run

    try:
        children = run_children(
            [("rank %d" % rank, rank_work(rank)) for rank in range(ranks)],
            timeout=limit,
            group=True,
        )
    finally:
        store_port.close()
    yield from unmeasured(host, found)
    yield from _judged(host, children, sizes, share_on_bus(ranks), on_cpu)


def _judged(host: Host, children: List[Child], sizes: List[int], share: float, on_cpu: bool) -> Measures:
    for child in children:
        if child.ending == BROKE:
            raise ValueError(child.words)
        if child.ending != DONE:
            host.note(child.words)
    silent = [child.words for child in children if child.ending == HUNG]
    lost = [child for child in children if child.ending not in (DONE, HUNG)]
    if silent and not lost:
        raise TimedOut(
            "%d of %d ranks did not end: %s" % (len(silent), len(children), "; ".join(silent)[:500])
        )
    yield Measure("ranks", len(children))
    yield Measure("lost_ranks", len(lost))
    if lost:
        return
    wrong = [sum(child.result["wrong"].values()) for child in children]
    if on_cpu:
        yield Measure("wrong_elements", sum(wrong))
    for rank, child in enumerate(children):
        if not on_cpu:
            yield Measure("wrong_elements", wrong[rank], str(rank))
        for size, count in child.result["wrong"].items():
            if count:
                host.note("rank %d: %d wrong elements at %s bytes" % (rank, count, size))
    # A collective is as fast as its slowest rank.
    seconds = {size: max(child.result["seconds"][str(size)] for child in children) for size in sizes}
    for size in sizes:
        rate = size / seconds[size] * share / 1e9
        host.note("%d bytes: %.1f us, bus %.2f GB/s" % (size, seconds[size] * 1e6, rate))
    prefix = "cpu_" if on_cpu else ""
    largest, smallest = max(sizes), min(sizes)
    yield Measure(prefix + "bus_gb_s", largest / seconds[largest] * share / 1e9)
    yield Measure(prefix + "latency_us", seconds[smallest] * 1e6)


def _measure(
    device: Device,
    distributed: Any,
    collective: Collective,
    sizes: List[int],
    *,
    ranks: int,
    repeats: int,
    say: Say,
) -> Dict[str, Any]:
    answer: Dict[str, Any] = {"seconds": {}, "wrong": {}}
    for size in sizes:
        say("%d bytes" % size)
        operation, wrong = collective(device.torch, device, size // 4, ranks)
        operation()
        device.synchronize()
        bad = wrong()
        times = []
        for _ in range(repeats):
            distributed.barrier()
            times.append(device.seconds(operation, 3) / 3)
        # Once more after the load: what heat breaks is right the first time.
        fresh, wrong_now = collective(device.torch, device, size // 4, ranks)
        fresh()
        device.synchronize()
        answer["wrong"][str(size)] = bad + wrong_now()
        answer["seconds"][str(size)] = statistics.median(times)
    distributed.barrier()
    return answer


def _allreduce(
    torch: Any, device: Device, elements: int, ranks: int
) -> Tuple[Callable[[], Any], Callable[[], int]]:
    """Small integers in float32, whose sum is exact in any order. The place decides the value, so that a
    shifted or stale part is wrong as well."""
    places = torch.arange(max(1, elements), device=device.at) % 1009
    rank = torch.distributed.get_rank()
    cells = (places * (rank + 1)).to(torch.float32)
    expected = (places * (ranks * (ranks + 1) // 2)).to(torch.float32)
    return lambda: torch.distributed.all_reduce(cells), lambda: int((cells != expected).sum().item())


def _alltoall(
    torch: Any, device: Device, elements: int, ranks: int
) -> Tuple[Callable[[], Any], Callable[[], int]]:
    """Part j of rank i goes to place i of rank j; each element says sender, receiver and place."""
    part = max(1, elements // ranks)
    places = torch.arange(part, device=device.at) % 1009
    rank = torch.distributed.get_rank()

    def values(sender: int, receiver: int) -> Any:
        return (places + 2000 * sender + 2000 * 512 * receiver).to(torch.float32)

    sent = torch.cat([values(rank, receiver) for receiver in range(ranks)])
    expected = torch.cat([values(sender, rank) for sender in range(ranks)])
    received = torch.zeros_like(sent)

    def wrong() -> int:
        return int((received != expected).sum().item())

    return lambda: torch.distributed.all_to_all_single(received, sent), wrong


class _Promise:
    """One number that rank 0 knows after the fork and that the others wait for: a pipe, a copy for each."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def give(self, number: int, takers: int) -> None:
        for _ in range(takers):
            os.write(self._writer, number.to_bytes(4, "little"))

    def take(self) -> int:
        os.close(self._writer)
        data = os.read(self._reader, 4)
        if len(data) < 4:
            raise RuntimeError("rank 0 ended before the others could meet it")
        return int.from_bytes(data, "little")

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


@contextlib.contextmanager
def _group(found: Found, rank: int, ranks: int, port: _Promise, seconds: float) -> Any:
    """The process group of all ranks, over loopback. Rank 0 holds the store and stays until all have left."""
    torch = found.torch
    distributed = torch.distributed
    # The ranks are on one machine: no other interface has to be up, and none is listened on.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    patience = datetime.timedelta(seconds=seconds)
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, ranks, True, timeout=patience, wait_for_workers=False)
        port.give(store.port, ranks - 1)
    else:
        store = distributed.TCPStore(
            "127.0.0.1", port.take(), ranks, False, timeout=patience, wait_for_workers=False
        )
    distributed.init_process_group(
        backend(found.kind), store=store, rank=rank, world_size=ranks, timeout=patience
    )
    yield distributed
    store.add("left", 1)
    deadline = time.monotonic() + 10.0
    while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.005)
    # Without destroy_process_group: it may wait for peers, and the process ends here in any case.
