"""The arithmetic of degrees and ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltf.config.schema import Parallel
from ltf.parallel.layout import Layout, LayoutError, Place

small = st.integers(1, 4)
layouts = st.builds(
    lambda pipeline, replicate, expert_shard, expert: Layout(
        pipeline, replicate, expert_shard * expert, expert
    ),
    small,
    small,
    small,
    small,
)


@given(layouts)
def test_every_rank_has_one_place_and_every_place_one_rank_in_the_order_of_the_mesh(layout: Layout) -> None:
    places = [layout.place(rank) for rank in range(layout.world)]
    assert places == sorted(set(places))
    assert [layout.rank(place) for place in places] == list(range(layout.world))
    assert places[-1] == Place(
        layout.pipeline - 1, layout.replicate - 1, layout.expert_shard - 1, layout.expert - 1
    )


@given(layouts)
def test_units_divide_the_ranks_and_each_holds_one_group_of_experts_in_every_stage(layout: Layout) -> None:
    units = [layout.unit_ranks(unit) for unit in range(layout.units)]
    assert sorted(rank for unit in units for rank in unit) == list(range(layout.world))
    for unit in units:
        places = [layout.place(rank) for rank in unit]
        assert {(p.pipeline, p.expert) for p in places} == {
            (p, e) for p in range(layout.pipeline) for e in range(layout.expert)
        }
        assert len({(p.replicate, p.expert_shard) for p in places}) == 1


@given(layouts)
def test_every_share_of_the_samples_is_read_once_in_each_stage(layout: Layout) -> None:
    read = sorted((layout.place(r).pipeline, layout.data_rank(r)) for r in range(layout.world))
    assert read == [(stage, share) for stage in range(layout.pipeline) for share in range(layout.data_ranks)]
    assert layout.world == layout.pipeline * layout.data_ranks


@given(small, small, small)
def test_the_shard_takes_the_rest(pipeline: int, replicate: int, shard: int) -> None:
    parallel = Parallel(pipeline=pipeline, replicate=replicate)
    assert Layout.of(parallel, pipeline * replicate * shard) == Layout(pipeline, replicate, shard, 1)


@given(small, small, small, st.integers(1, 64))
def test_a_mix_is_accepted_exactly_if_its_product_is_the_world(p: int, r: int, s: int, world: int) -> None:
    parallel = Parallel(pipeline=p, replicate=r, shard=s)
    if p * r * s == world:
        assert Layout.of(parallel, world).world == world
    else:
        with pytest.raises(LayoutError):
            Layout.of(parallel, world)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            Parallel(pipeline=2, shard=3),
            8,
            "pipeline 2 x replicate 1 x shard 3 = 6, but there are 8 ranks: "
            "give e.g. parallel.shard 4 (or `rest`), or start 6 ranks",
        ),
        (
            Parallel(replicate=3, shard=4),
            8,
            "pipeline 1 x replicate 3 x shard 4 = 12, but there are 8 ranks: "
            "give e.g. parallel.replicate 2, or start 12 ranks",
        ),
        (
            Parallel(pipeline=3, shard=5),
            1,
            "pipeline 3 x replicate 1 x shard 5 = 15, but there is 1 rank: "
            "start 15 ranks, or give degrees whose product is 1",
        ),
        (
            Parallel(pipeline=3),
            8,
            "pipeline 3 x replicate 1 = 3 does not divide the 8 ranks there are, so no shard fills the rest: "
            "give parallel.pipeline and parallel.replicate a product that divides 8, "
            "or start a multiple of 3 ranks",
        ),
        (
            Parallel(expert=3),
            8,
            "parallel.expert 3 does not divide parallel.shard 8 (8 = 2 x 3 + 2): experts are divided inside "
            "a shard group; give expert one of 1, 2, 4, 8, or shard a multiple of 3",
        ),
    ],
)
def test_a_wrong_mix_is_refused_with_the_arithmetic_and_a_way_out(
    parallel: Parallel, world: int, message: str
) -> None:
    with pytest.raises(LayoutError) as refused:
        Layout.of(parallel, world)
    assert str(refused.value) == message


def test_a_rank_outside_of_the_world_has_no_place() -> None:
    with pytest.raises(LayoutError, match="rank 4 is not in a world of 4 ranks"):
        Layout(shard=4).place(4)
