from __future__ import annotations

import pytest
import torch

from ltf.model.args import MoEArgs
from ltf.model.router import Router
from ltf.parallel.crossing import Crossing, expected_rows, link_bytes, rows_of
from ltf.parallel.topology import Places, node_map


def test_ranks_are_numbered_by_the_node_they_name() -> None:
    assert node_map(["gpu7", "gpu7", "gpu2", "gpu7", "gpu2"]) == [0, 0, 1, 0, 1]
    assert node_map([]) == []


def test_rows_are_counted_from_what_tokens_chose() -> None:
    # Eight experts on ranks 0 to 3, two each; ranks 0 and 1 are one node.
    chosen = torch.tensor([[0, 3], [0, 4], [5, 7], [1, 2]])
    assert rows_of(chosen, 8, [0, 0, 1, 1], 0) == Crossing(flat=3, topology=2)
    assert rows_of(chosen, 8, [0, 0, 1, 1], 3) == Crossing(flat=5, topology=3)
    assert rows_of(chosen, 8, [0, 1, 2, 3], 0) == Crossing(flat=5, topology=5)
    assert rows_of(chosen, 8, [4, 4, 4, 4], 0) == Crossing(flat=0, topology=0)
    assert rows_of(chosen[:0], 8, [0, 0, 1, 1], 0) == Crossing(flat=0, topology=0)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_the_expectation_is_what_a_real_router_does_on_average(top_k: int) -> None:
    experts, tokens, routers = 32, 500, 12
    maps = [(0, 0, 1, 1), (0, 1, 0, 0), (0, 1, 2, 3), (2, 2, 2, 2)]
    found = dict.fromkeys(maps, Crossing(0, 0))
    for seed in range(routers):
        generator = torch.Generator().manual_seed(seed)
        router = Router(256, MoEArgs(experts=experts, top_k=top_k, expert_width=8, renormalise=False), top_k)
        torch.nn.init.normal_(router.weight, generator=generator)
        with torch.no_grad():
            chosen = router(torch.randn(4, tokens, 256, generator=generator)).experts.view(4, tokens, top_k)
        for nodes in maps:
            for rank in range(4):
                found[nodes] += rows_of(chosen[rank], experts, nodes, rank)
    for nodes in maps:
        expected = expected_rows(experts, top_k, nodes, tokens)
        assert found[nodes].flat / routers == pytest.approx(expected.flat, rel=0.03)
        assert found[nodes].topology / routers == pytest.approx(expected.topology, rel=0.03)


def test_two_equal_nodes_save_nearly_half_of_top_k() -> None:
    rows = expected_rows(64, 8, [0] * 4 + [1] * 4, tokens=1)
    assert rows.flat == pytest.approx(8 * 4)
    assert 0.99 * 8 < rows.topology < 8


def test_one_expert_a_token_crosses_as_often_either_way() -> None:
    rows = expected_rows(32, 1, [0, 0, 1, 1], tokens=10)
    assert rows.flat == pytest.approx(rows.topology) == pytest.approx(20)


def test_bytes_are_four_crossings_a_row_and_twelve_bytes_a_choice() -> None:
    found = link_bytes(Crossing(flat=100, topology=40), width=16, element_bytes=2)
    assert found.flat == 100 * 4 * 32
    assert found.topology == 40 * 4 * 32 + 100 * 12


@pytest.mark.parametrize(("experts", "top_k"), [(7, 2), (8, 9), (8, 0)])
def test_impossible_routings_are_refused(experts: int, top_k: int) -> None:
    with pytest.raises(ValueError):
        expected_rows(experts, top_k, [0, 1], 1)


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 2, 2, 2], [1, 0, 1, 0]], ids=str)
def test_every_rank_of_a_node_takes_an_even_part_of_what_comes_in(nodes: list[int]) -> None:
    tokens = 60
    places = Places(nodes)
    tables = places.on(torch.device("cpu"), 1)
    taken = torch.zeros(len(nodes), len(nodes), dtype=torch.int64)
    for rank in range(len(nodes)):
        relays = places.relays(rank, tokens, tables)
        for column in relays.T:
            taken[rank] += torch.bincount(column, minlength=len(nodes))
    node = torch.tensor(places.node)
    at_home = node[:, None].eq(node)
    assert torch.equal(taken[at_home], tokens * torch.eye(len(nodes), dtype=torch.int64)[at_home])
    for sender in range(places.nodes):
        for receiver in range(places.nodes):
            part = taken[node.eq(sender)][:, node.eq(receiver)].sum(0)
            assert part.sum() == tokens * places.node.count(sender)
            assert part.max() - part.min() <= 1
