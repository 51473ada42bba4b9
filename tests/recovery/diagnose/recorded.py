"""Made-up recordings: programs of collectives are simulated, and what torch would have dumped is written.

The records follow ``torch/csrc/distributed/c10d/FlightRecorder.hpp`` (version 2.10); nothing is copied from a
real dump. Real dumps are made by ``hanging_ranks.py``.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recovery.diagnose.flightrecorder import parse_dump
from recovery.diagnose.recording import Dump


def record(
    group: int,
    op: str,
    seq: int,
    *,
    state: str = "scheduled",
    number: int = 0,
    size: Sequence[int] = (4,),
    dtype: str = "Float",
    backend: str = "nccl",
    p2p: bool = False,
    created: int = 0,
    where: tuple[str, int] = ("/job/train.py", 88),
) -> dict:
    """One entry of a dump."""
    done = state == "completed"
    return {
        "frames": [
            {"name": op, "filename": "/x/site-packages/torch/distributed/distributed_c10d.py", "line": 2806},
            {"name": "step", "filename": where[0], "line": where[1]},
            {"name": "<module>", "filename": where[0], "line": 120},
        ],
        "record_id": number,
        "pg_id": group,
        "process_group": (str(group), "default_pg" if group == 0 else f"group{group}"),
        "thread_name": "python",
        "thread_id": "1",
        "collective_seq_id": 0 if p2p else seq,
        "p2p_seq_id": seq if p2p else 0,
        "op_id": seq,
        "profiling_name": f"{backend}:{op}",
        "time_created_ns": created or 1_700_000_000_000_000_000 + number,
        "input_sizes": [list(size)],
        "input_dtypes": [dtype],
        "output_sizes": [list(size)],
        "output_dtypes": [dtype],
        "state": state if backend != "gloo" else "scheduled",
        "time_discovered_started_ns": 1 if done else None,
        "time_discovered_completed_ns": 2 if done else None,
        "retired": done,
        "timeout_ms": 600_000,
        "is_p2p": p2p,
    }


def document(
    entries: Sequence[dict], groups: Mapping[int, Sequence[int]], *, status: dict | None = None
) -> dict:
    """A whole dump, before it is pickled."""
    return {
        "version": "2.10",
        "pg_config": {
            str(g): {
                "name": str(g),
                "desc": "default_pg" if g == 0 else f"group{g}",
                "ranks": str(list(ranks)),
            }
            for g, ranks in groups.items()
        },
        "comm_lib_version": "2.27.3",
        "pg_status": status or {},
        "entries": list(entries),
    }


def dump(rank: int, entries: Sequence[dict], groups: Mapping[int, Sequence[int]], **more: dict) -> Dump:
    """What the reader makes of it, through the very bytes."""
    return parse_dump(pickle.dumps(document(entries, groups, **more), protocol=2), rank)


@dataclass(frozen=True)
class Program:
    """Collectives that every member issues in the same order: (group, operation)."""

    groups: dict[int, tuple[int, ...]]
    ops: tuple[tuple[int, str], ...]

    @property
    def ranks(self) -> range:
        return range(len(self.groups[0]))


@dataclass
class Played:
    """Where every rank came to: indices of ``Program.ops``."""

    enqueued: dict[int, list[int]]
    finished: dict[int, set[int]]


def play(
    program: Program,
    *,
    stopped: int,
    after: int,
    ahead: int = 1,
    device: bool = False,
) -> Played:
    """Run until nothing moves. ``stopped`` enqueues ``after`` operations and then no more; with ``device``
    it goes on enqueuing, but the first operation from ``after`` on never finishes on it, though on its peers.
    ``ahead`` operations may be open at once (1: each one blocks)."""
    mine = {r: [i for i, (g, _) in enumerate(program.ops) if r in program.groups[g]] for r in program.ranks}
    enqueued: dict[int, list[int]] = {r: [] for r in program.ranks}
    finished: dict[int, set[int]] = {r: set() for r in program.ranks}
    moved = True
    while moved:
        moved = False
        for r in program.ranks:
            limit = min(after, len(mine[r])) if r == stopped and not device else len(mine[r])
            while len(enqueued[r]) < limit and len(enqueued[r]) - len(finished[r]) < ahead:
                enqueued[r].append(mine[r][len(enqueued[r])])
                moved = True
        front = {r: next((i for i in enqueued[r] if i not in finished[r]), None) for r in program.ranks}
        for i, (g, _) in enumerate(program.ops):
            members = program.groups[g]
            if all(front[r] == i for r in members):
                moved = True
                for r in members:
                    if device and r == stopped and mine[r].index(i) >= after:
                        continue
                    finished[r].add(i)
                if device and stopped in members and mine[stopped].index(i) >= after:
                    return _settle(program, enqueued, finished, stopped, mine, ahead)
    return Played(enqueued, finished)


def _settle(
    program: Program,
    enqueued: dict[int, list[int]],
    finished: dict[int, set[int]],
    stuck: int,
    mine: Mapping[int, list[int]],
    ahead: int,
) -> Played:
    """The others go on as far as they can without the rank whose device hangs."""
    moved = True
    while moved:
        moved = False
        for r in program.ranks:
            while len(enqueued[r]) < len(mine[r]) and len(enqueued[r]) - len(finished[r]) < ahead:
                enqueued[r].append(mine[r][len(enqueued[r])])
                moved = True
        front = {r: next((i for i in enqueued[r] if i not in finished[r]), None) for r in program.ranks}
        for i, (g, _) in enumerate(program.ops):
            if stuck not in program.groups[g] and all(front[r] == i for r in program.groups[g]):
                moved = True
                for r in program.groups[g]:
                    finished[r].add(i)
    return Played(enqueued, finished)


def dumps_of(
    program: Program,
    played: Played,
    *,
    backend: str = "nccl",
    only_active: bool = False,
    change: Callable[[int, int, dict], dict] = lambda rank, op, entry: entry,
) -> dict[int, Dump]:
    """The dumps that the ranks would have written."""
    number_in_group: list[int] = []
    count: dict[int, int] = {}
    for group, _ in program.ops:
        count[group] = count.get(group, 0) + 1
        number_in_group.append(count[group])
    dumps = {}
    for r in program.ranks:
        groups = {g: members for g, members in program.groups.items() if r in members}
        entries, status = [], {}
        for number, i in enumerate(played.enqueued[r]):
            group, op = program.ops[i]
            state = "completed" if i in played.finished[r] else "scheduled"
            status[str(group)] = {
                "last_enqueued_collective": number_in_group[i],
                "last_completed_collective": 0,
            }
            if not (only_active and state == "completed"):
                entry = record(group, op, number_in_group[i], state=state, number=number, backend=backend)
                entries.append(change(r, i, entry))
        dumps[r] = dump(r, entries, groups, status=status)
    return dumps
