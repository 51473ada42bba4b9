"""Real Gloo ranks that hang on purpose and let torch dump its flight recorder: ``OUTPUT SCENARIO...``.

One process imports torch and forks the ranks of each scenario. A rank writes its dump when it has come to
where the scenario leaves it: inside an unfinished operation, or idle.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

RANKS = 4
PATIENCE_S = 90.0


def never_enters(rank, dist, ones, arrive):
    for _ in range(3):
        dist.all_reduce(ones(4))
    arrive(recorded=rank != 2)
    if rank != 2:
        dist.all_reduce(ones(4))


def other_collective(rank, dist, ones, arrive):
    dist.all_reduce(ones(4))
    arrive()
    if rank == 1:
        dist.broadcast(ones(4), src=0)
    else:
        dist.all_reduce(ones(4))


def other_size(rank, dist, ones, arrive):
    dist.all_reduce(ones(4))
    arrive()
    dist.all_gather([ones(6 if rank == 3 else 4) for _ in range(RANKS)], ones(6 if rank == 3 else 4))


def lonely_receive(rank, dist, ones, arrive):
    dist.all_reduce(ones(4))
    arrive(recorded=False)
    if rank == 0:
        dist.recv(ones(4), src=1)


def dead(rank, dist, ones, arrive):
    dist.all_reduce(ones(4))
    if rank == 1:
        os._exit(1)
    arrive()
    dist.barrier()


def two_axes(rank, dist, ones, arrive):
    """Rows 0-1 and 2-3, columns 0,2 and 1,3; rank 3 stops before its row, and the columns wait in turn."""
    rows = [dist.new_group([0, 1], group_desc="row"), dist.new_group([2, 3], group_desc="row")]
    columns = [dist.new_group([0, 2], group_desc="column"), dist.new_group([1, 3], group_desc="column")]
    for _ in range(2):
        dist.all_reduce(ones(4), group=rows[rank // 2])
        dist.all_reduce(ones(4), group=columns[rank % 2])
    if rank >= 2:
        arrive(recorded=rank == 2)
    if rank != 3:
        dist.all_reduce(ones(4), group=rows[rank // 2])
        arrive()
        dist.all_reduce(ones(4), group=columns[rank % 2])


def swapped_order(rank, dist, ones, arrive):
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    for group in (first, second):
        if rank < 2:
            dist.all_reduce(ones(4), group=group)
    arrive(recorded=rank < 2)
    if rank < 2:
        dist.all_reduce(ones(4), group=first if rank == 0 else second)


def _rank(scenario, rank, output):
    import torch
    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d

    where = f"file://{output}/store"
    dist.init_process_group(
        "gloo", init_method=where, rank=rank, world_size=RANKS, timeout=timedelta(seconds=PATIENCE_S)
    )
    there = threading.Event()
    hangs_in = []

    def arrive(recorded=True):
        """The next operation is the one that hangs; or nothing more is going to be recorded."""
        if recorded:
            hangs_in.append(len(_entries(c10d)))
        else:
            there.set()

    def program():
        try:
            globals()[scenario](rank, dist, torch.ones, arrive)
        except RuntimeError:  # a peer is gone: what the recorder then holds is what a supervisor would find
            there.set()

    threading.Thread(target=program, daemon=True).start()
    end = time.monotonic() + PATIENCE_S / 2
    while time.monotonic() < end and not there.is_set():
        entries = _entries(c10d)
        if hangs_in and len(entries) > hangs_in[-1]:
            break
        time.sleep(0.02)
    (output / f"rank_{rank}").write_bytes(c10d._dump_fr_trace(True, True, False))
    (output / f"rank_{rank}.json").write_bytes(c10d._dump_fr_trace_json(True, False))
    # Leaving would end the others' operations before they have dumped.
    survivors = RANKS - (scenario in ("dead", "other_size"))
    while time.monotonic() < end and len(list(output.glob("rank_*.json"))) < survivors:
        time.sleep(0.02)
    os._exit(0)


def _entries(c10d):
    return json.loads(c10d._dump_fr_trace_json(True, False)).get("entries", [])


def main():
    # Once, for all ranks: the first collective imports these.
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    root = Path(sys.argv[1]).resolve()
    for scenario in sys.argv[2:]:
        output = root / scenario
        output.mkdir(parents=True)
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                try:
                    _rank(scenario, rank, output)
                finally:
                    os._exit(3)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
