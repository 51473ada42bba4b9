"""Who is named, on made-up programs with one fault and on cases made by hand."""

import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.diagnose.waitfor import Kind, diagnose

from .recorded import Program, dump, dumps_of, play, record

LIGHT = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
SYMMETRIC = ("all_reduce", "_all_gather_base", "_reduce_scatter_base")


@st.composite
def programs(draw: st.DrawFn, ops: tuple[str, ...] = (*SYMMETRIC, "broadcast", "all_to_all")) -> Program:
    size = draw(st.integers(4, 64))
    groups = {0: tuple(range(size))}
    for number in range(1, draw(st.integers(1, 7))):
        members = draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=min(size, 16)))
        groups[number] = tuple(sorted(members))
    steps = draw(
        st.lists(st.tuples(st.sampled_from(sorted(groups)), st.sampled_from(ops)), min_size=1, max_size=30)
    )
    return Program(groups, tuple(steps))


@LIGHT
@given(programs(), st.data())
def test_the_one_rank_that_stopped_is_named_and_no_other(program: Program, data: st.DataObject) -> None:
    stopped = data.draw(st.sampled_from(list(program.ranks)))
    played = play(
        program,
        stopped=stopped,
        after=data.draw(st.integers(0, len(program.ops))),
        ahead=data.draw(st.sampled_from([1, 3, 50])),
    )
    dumps = dumps_of(program, played, backend=data.draw(st.sampled_from(["nccl", "gloo"])))
    found = diagnose(dumps)
    waiting = any(d.unfinished for d in dumps.values())
    assert (found.kind, found.culprits) == ((Kind.STOPPED, (stopped,)) if waiting else (Kind.NOTHING, ()))
    assert not waiting or found.evidence


@LIGHT
@given(programs(), st.data())
def test_dumps_of_active_operations_alone_name_the_same_rank(program: Program, data: st.DataObject) -> None:
    stopped = data.draw(st.sampled_from(list(program.ranks)))
    played = play(program, stopped=stopped, after=data.draw(st.integers(0, len(program.ops))), ahead=3)
    dumps = dumps_of(program, played, only_active=True)
    found = diagnose(dumps)
    assert set(found.culprits) == ({stopped} if any(d.unfinished for d in dumps.values()) else set())


@LIGHT
@given(programs(), st.data())
def test_a_stopped_rank_without_a_dump_is_named_as_missing(program: Program, data: st.DataObject) -> None:
    stopped = data.draw(st.sampled_from(list(program.ranks)))
    played = play(program, stopped=stopped, after=data.draw(st.integers(0, len(program.ops))), ahead=3)
    dumps = dumps_of(program, played)
    del dumps[stopped]
    found = diagnose(dumps)
    if any(d.unfinished for d in dumps.values()):
        assert (found.kind, found.culprits) == (Kind.MISSING, (stopped,))
    else:
        assert (found.kind, found.culprits, found.suspects) == (Kind.NOTHING, (), (stopped,))


@LIGHT
@given(programs(), st.data())
def test_a_lost_dump_of_an_innocent_rank_does_not_hide_the_culprit(
    program: Program, data: st.DataObject
) -> None:
    stopped, lost = data.draw(st.permutations(list(program.ranks)))[:2]
    played = play(program, stopped=stopped, after=data.draw(st.integers(0, len(program.ops))), ahead=2)
    dumps = dumps_of(program, played)
    before = diagnose(dumps)
    del dumps[lost]
    found = diagnose(dumps)
    assert set(found.culprits) <= {stopped, lost}
    if before.culprits and any(stopped in w.lacking and set(w.waiting) != {lost} for w in before.edges):
        assert found.culprits == (stopped,)
        assert lost in found.suspects


@LIGHT
@given(programs(ops=SYMMETRIC), st.data())
def test_a_rank_that_cannot_finish_what_its_peers_finished_is_named(
    program: Program, data: st.DataObject
) -> None:
    stuck = data.draw(st.sampled_from(list(program.ranks)))
    played = play(
        program,
        stopped=stuck,
        after=data.draw(st.integers(0, 5)),
        ahead=data.draw(st.sampled_from([1, 4, 50])),
        device=True,
    )
    dumps = dumps_of(program, played, only_active=data.draw(st.booleans()))
    found = diagnose(dumps)
    assert set(found.culprits) == ({stuck} if dumps[stuck].unfinished else set())


@LIGHT
@given(programs(ops=SYMMETRIC), st.data())
def test_the_minority_of_a_mismatch_is_named(program: Program, data: st.DataObject) -> None:
    odd = data.draw(st.sampled_from(list(program.ranks)))
    played = play(program, stopped=odd, after=0)  # everybody else hangs in the first operation with it
    at = next((i for i, (g, _) in enumerate(program.ops) if odd in program.groups[g]), None)
    if at is None or len(program.groups[program.ops[at][0]]) < 3:
        return
    members = program.groups[program.ops[at][0]]
    if any(played.enqueued[r][-1:] != [at] for r in members if r != odd):
        return
    played.enqueued[odd].append(at)
    what = data.draw(st.sampled_from(["op", "size", "dtype"]))

    def change(rank: int, op: int, entry: dict) -> dict:
        if rank != odd or op != at:
            return entry
        changed = {"op": {"profiling_name": "nccl:barrier"}, "size": {"input_sizes": [[9]]}}
        return {**entry, **changed.get(what, {"input_dtypes": ["Half"]})}

    found = diagnose(dumps_of(program, played, change=change, only_active=data.draw(st.booleans())))
    assert (found.kind, found.culprits) == (Kind.MISMATCH, (odd,))


PAIR = {0: (0, 1)}


def test_two_ranks_that_disagree_are_both_named() -> None:
    found = diagnose(
        {
            0: dump(0, [record(0, "all_reduce", 7)], PAIR),
            1: dump(1, [record(0, "broadcast", 7, where=("/job/eval.py", 5))], PAIR),
        }
    )
    assert (found.kind, found.culprits) == (Kind.MISMATCH, (0, 1))
    assert "rank 1 did broadcast of 4 Float, in broadcast at eval.py:5 (step)" in found.evidence[1]


def test_uneven_all_to_all_is_no_mismatch() -> None:
    found = diagnose({r: dump(r, [record(0, "all_to_all", 7, size=(10 + r, 8))], PAIR) for r in range(2)})
    assert (found.kind, found.culprits, found.suspects) == (Kind.TOGETHER, (), (0, 1))


def test_groups_taken_in_different_orders_are_a_cycle_and_nobody_is_blamed() -> None:
    groups = {0: (0, 1), 1: (0, 1)}
    found = diagnose(
        {
            0: dump(0, [record(0, "all_reduce", 1)], groups),
            1: dump(1, [record(1, "all_reduce", 1)], groups),
        }
    )
    assert (found.kind, found.culprits, found.suspects) == (Kind.CYCLE, (), (0, 1))
    assert "rank 0 waits on rank 1" in found.evidence


def test_a_receive_without_its_send_names_the_rank_that_did_not_send() -> None:
    groups = {3: (4, 6)}
    found = diagnose(
        {
            4: dump(4, [record(3, "recv 0<-1", 5, p2p=True)], groups),
            6: dump(6, [], groups, status={}),
        }
    )
    assert (found.kind, found.culprits) == (Kind.STOPPED, (6,))
    assert found.edges[0].op == "recv"


def test_the_second_of_two_sends_waits_when_only_one_was_received() -> None:
    sends = [
        record(0, "send 0->1", n, p2p=True, number=n - 1, state=s)
        for n, s in ((1, "completed"), (2, "scheduled"))
    ]
    received = [record(0, "recv 1<-0", 1, p2p=True, state="completed")]
    found = diagnose({0: dump(0, sends, PAIR), 1: dump(1, received, PAIR)})
    assert (found.kind, found.culprits) == (Kind.STOPPED, (1,))


def test_a_matched_pair_that_does_not_move_blames_nobody() -> None:
    found = diagnose(
        {
            0: dump(0, [record(0, "send 0->1", 1, p2p=True)], PAIR),
            1: dump(1, [record(0, "recv 1<-0", 1, p2p=True)], PAIR),
        }
    )
    assert (found.kind, found.culprits) == (Kind.TOGETHER, ())


def test_a_pipeline_waits_back_to_the_stage_that_stopped() -> None:
    """Each stage waits to receive from the one before; the first never sent."""
    groups = {5: (0, 1, 2, 3)}
    dumps = {0: dump(0, [], groups)}
    for r in (1, 2, 3):
        dumps[r] = dump(r, [record(5, f"recv {r}<-{r - 1}", 9, p2p=True)], groups)
    found = diagnose(dumps)
    assert found.culprits == (0,)


def test_the_parts_of_a_coalesced_exchange_that_finished_are_not_waited_for() -> None:
    """NCCL leaves the parts' own state at scheduled; the coalesced entry has the group's."""
    parts = [record(0, "send 0->1", 3, p2p=True), record(0, "recv 0<-1", 3, p2p=True, number=1)]
    whole = {**record(0, "coalesced", 3, p2p=True, number=2, state="completed")}
    found = diagnose({0: dump(0, [*parts, whole], PAIR), 1: dump(1, [], PAIR)})
    assert found.kind is Kind.NOTHING


def test_gloo_calls_a_failed_operation_ended_and_the_absent_rank_is_still_named() -> None:
    ended = [record(0, "all_reduce", n, state="completed", number=n - 1, backend="gloo") for n in (1, 2)]
    groups = {0: (0, 1, 2)}
    found = diagnose({0: dump(0, ended, groups), 1: dump(1, ended, groups), 2: dump(2, ended[:1], groups)})
    assert (found.kind, found.culprits) == (Kind.STOPPED, (2,))


def test_members_that_no_dump_names_are_taken_from_the_caller() -> None:
    both = record(0, "barrier", 1, state="completed", backend="gloo")
    alone = {0: dump(0, [both, record(4, "all_reduce", 1, backend="gloo")], {}), 1: dump(1, [both], {})}
    assert diagnose(alone).culprits == ()
    assert diagnose(alone, groups={"4": (0, 1)}).culprits == (1,)


def test_a_rank_that_never_appears_is_missing_when_the_world_is_larger() -> None:
    entry = record(0, "all_reduce", 1, backend="gloo")
    found = diagnose({r: dump(r, [entry], {}) for r in range(3)}, world_size=4)
    assert (found.kind, found.culprits) == (Kind.MISSING, (3,))
    assert "no dump of rank 3" in found.evidence


def test_no_dumps_at_all_blame_nobody() -> None:
    found = diagnose({}, world_size=2)
    assert (found.kind, found.culprits, found.suspects) == (Kind.NOTHING, (), (0, 1))


@pytest.mark.parametrize("size", [512, 2048])
def test_thousands_of_ranks_take_seconds(size: int) -> None:
    """Tensor, pipeline, data and world groups; one rank stops and everyone piles up in 20 operations."""
    tensor = [tuple(range(i, i + 8)) for i in range(0, size, 8)]
    data = [tuple(range(i, size, 8)) for i in range(8)]
    names = {0: tuple(range(size)), **{1 + i: g for i, g in enumerate([*tensor, *data])}}
    mine: dict[int, dict[int, tuple[int, ...]]] = {r: {} for r in range(size)}
    for name, members in names.items():
        for r in members:
            mine[r][name] = members
    stopped = size // 2 + 3
    blank = dump(0, [], {0: (0,)})
    dumps = {}
    for r in range(size):
        entries = []
        for n in range(20):
            name = sorted(mine[r])[n % 3]
            entries.append(
                record(name, "all_reduce", n // 3 + 1, state="completed" if n < 10 else "scheduled", number=n)
            )
        kept = entries[:10] if r == stopped else entries
        # Only the graph is measured: 2,048 pickles that list 2,048 ranks each would dwarf it.
        small = dump(r, kept, dict.fromkeys(mine[r], (r,)))
        groups = {str(g): replace(small.groups[str(g)], ranks=members) for g, members in mine[r].items()}
        dumps[r] = replace(
            blank,
            **{f: getattr(small, f) for f in ("entries", "progress", "exchanges", "whole")},
            rank=r,
            groups=groups,
        )
    start = time.process_time()
    found = diagnose(dumps)
    took = time.process_time() - start
    # Everyone enqueued ahead of the stop: whoever shares a group with it waits there, the rest behind those.
    assert found.culprits == (stopped,)
    assert took < 5.0, took


def test_a_coalesced_launch_cut_in_half_by_the_ring_is_no_mismatch() -> None:
    def part(number: int, state: str) -> dict:
        return record(0, "all_reduce", 7, number=number, state=state)

    whole = [part(5, "scheduled"), part(6, "scheduled"), record(0, "coalesced", 7, number=7)]
    cut = [part(6, "completed"), record(0, "coalesced", 7, number=7, state="completed")]
    found = diagnose({0: dump(0, whole, PAIR), 1: dump(1, cut, PAIR)})
    assert found.kind is not Kind.MISMATCH
