from __future__ import annotations

from collections.abc import Mapping, Sequence

from ltf.findings import Severity
from ltf.guard.digest import Difference
from ltf.guard.point import Phase, Point, Segment
from ltf.guard.verdict import Kind, Setting, Verdict, clean_pair, judge, pairs

ATTENTION = Point(Phase.FORWARD, 1, 3, Segment.ATTENTION)
EXPERTS = Point(Phase.FORWARD, 1, 3, Segment.EXPERTS)
RECEIVED = Point(Phase.FORWARD, 1, 4, Segment.RECEIVED)
BUCKET = Point(Phase.BUCKET, 0, 5, Segment.BLOCK)
REDUCED = Point(Phase.REDUCED, 0, 5, Segment.BLOCK)


def differences(ranks: int, where: Mapping[int, Point] | None = None) -> list[Difference]:
    where = where or {}
    return [Difference(where.get(rank), 9 if rank in where else 0, 50) for rank in range(ranks)]


def alike(ranks: int) -> dict[tuple[int, int], list[Difference]]:
    return {(0, 1): differences(ranks)}


def ring(units: int, bad: Mapping[int, Point]) -> Verdict:
    """One rank a unit; `bad`: ranks that disagree with the next unit's own result."""
    return judge(alike(units), differences(units, bad), Setting(range(units), layers=8))


def runs(wrong: Sequence[Mapping[int, Point]], ranks: int) -> dict[tuple[int, int], list[Difference]]:
    """`wrong`: of each run, which ranks were wrong in it, each time otherwise, and where first."""
    table = {}
    for a, b in pairs(len(wrong)):
        together = {**wrong[a], **wrong[b]}
        table[a, b] = differences(ranks, together)
    return table


def test_the_unit_that_disagrees_with_both_neighbours_is_named() -> None:
    for rank in range(4):
        verdict = ring(4, {(rank - 1) % 4: ATTENTION, rank: ATTENTION})
        assert (verdict.kind, verdict.ranks, verdict.point) == (Kind.PERSISTENT, (rank,), ATTENTION)


def test_two_faulty_units_apart_are_both_named() -> None:
    verdict = ring(6, {0: ATTENTION, 1: ATTENTION, 3: EXPERTS, 4: ATTENTION})
    assert verdict.ranks == (1, 4)


def test_a_single_disagreement_among_many_names_the_pair_alone() -> None:
    verdict = ring(5, {2: ATTENTION})
    assert (verdict.kind, verdict.ranks, verdict.candidates) == (Kind.PERSISTENT, (), (2, 3))


def test_if_all_disagree_with_all_nobody_is_named() -> None:
    verdict = ring(3, {0: ATTENTION, 1: ATTENTION, 2: ATTENTION})
    assert (verdict.ranks, verdict.candidates) == ((), (0, 1, 2))


def test_in_a_unit_of_stages_the_stage_where_it_began_is_named() -> None:
    # Units 0, 1, 2 are ranks (0, 3), (1, 4) and (2, 5); rank 1 is wrong, and its next stage receives it.
    bad = {0: ATTENTION, 3: RECEIVED, 1: ATTENTION, 4: RECEIVED}
    verdict = judge(alike(6), differences(6, bad), Setting([0, 1, 2, 0, 1, 2], layers=8))
    assert (verdict.kind, verdict.ranks) == (Kind.PERSISTENT, (1,))


def test_partners_of_another_kind_are_no_evidence() -> None:
    setting = Setting([0, 1], layers=8, suspected=True)
    verdict = judge(alike(2), [None, None], setting)
    assert verdict.kind is Kind.UNDETERMINED
    assert "same kind" in verdict.message


def test_of_three_runs_the_majority_says_which_was_wrong() -> None:
    repeats = runs([{}, {1: ATTENTION}, {}], 3)
    assert clean_pair(repeats) == (0, 2)
    verdict = judge(repeats, None, Setting(range(3), layers=8))
    assert (verdict.kind, verdict.ranks) == (Kind.TRANSIENT, (1,))
    assert verdict.evidence["wrong_runs"] == [1]


def test_a_rank_that_is_wrong_in_several_runs_has_a_persistent_fault() -> None:
    repeats = runs([{1: ATTENTION}, {1: ATTENTION}, {}, {}], 3)
    assert clean_pair(repeats) == (2, 3)
    verdict = judge(repeats, None, Setting(range(3), layers=8))
    assert (verdict.kind, verdict.ranks) == (Kind.PERSISTENT, (1,))


def test_ranks_that_only_received_the_difference_are_not_named() -> None:
    repeats = runs([{0: RECEIVED, 1: EXPERTS, 2: REDUCED}, {}, {}], 3)
    verdict = judge(repeats, None, Setting([0, 0, 1], layers=8))
    assert verdict.ranks == (1,)


def test_a_reduction_that_varied_over_equal_gradients_names_no_rank() -> None:
    repeats = runs([{0: REDUCED, 1: REDUCED}, {}, {}], 2)
    verdict = judge(repeats, None, Setting([0, 1], layers=8))
    assert (verdict.kind, verdict.ranks, verdict.candidates) == (Kind.UNDETERMINED, (), (0, 1))


def test_one_unit_that_never_repeats_itself_decides_nothing() -> None:
    everywhere = {0: BUCKET}
    verdict = judge(runs([everywhere] * 4, 1), None, Setting([0], layers=8))
    assert verdict.kind is Kind.UNDETERMINED


def test_only_hardware_is_an_error() -> None:
    assert Verdict(Kind.CLEAN, "").finding(3) is None
    for kind in set(Kind) - {Kind.CLEAN}:
        finding = Verdict(kind, "m", (1,)).finding(3)
        assert finding is not None
        assert finding.kind == f"corruption.{kind.value}"
        hardware = kind in (Kind.TRANSIENT, Kind.PERSISTENT)
        assert finding.severity is (Severity.ERROR if hardware else Severity.WARNING)
