from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ltf.model.experts import Experts
from ltf.model.moe import TokenExchange, local_exchange
from ltf.model.router import Routing, RoutingStats
from ltf.parallel.exchange import FlatExchange
from ltf.parallel.topology import TopologyExchange
from tests.ltf import ranks

WIDTH, HIDDEN = 16, 8
NODES = {
    "flat": None,
    "one node": [0, 0, 0, 0],
    "two nodes of two": [0, 0, 1, 1],
    "ranks of two nodes in turns": [7, 3, 7, 3],
    "nodes of three and one": [0, 1, 0, 0],
    "four nodes of one": [0, 1, 2, 3],
    "nodes of two, one and one": [5, 6, 6, 7],
}


@dataclass(frozen=True)
class Case:
    """What every rank chose: chosen[rank][token] are the experts of a token."""

    chosen: list[list[list[int]]]
    top_k: int
    experts: int = 8
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def choices(self, rank: int) -> Tensor:
        return torch.tensor(self.chosen[rank], dtype=torch.int64).view(-1, self.top_k)


@dataclass
class Passed:
    """One rank's output and gradients."""

    out: Tensor
    x: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    pauses: int = 0

    def tensors(self) -> list[Tensor]:
        return [self.out, self.x, self.weights, self.gate_up, self.down]


@dataclass
class Stopwatch:
    pauses: int = 0
    depth: int = field(default=0)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        assert self.depth == 0
        self.depth, self.pauses = 1, self.pauses + 1
        yield
        self.depth = 0


def all_experts(case: Case) -> Experts:
    experts = Experts(case.experts, WIDTH, HIDDEN)
    for i, parameter in enumerate(experts.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(100 + i))
    return experts.to(case.dtype)


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, routing weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    count = case.choices(rank).shape[0]
    x, up = (torch.randn(count, WIDTH, generator=generator).to(case.dtype) for _ in range(2))
    return x, torch.rand(count, case.top_k, generator=generator), up


def passes(
    exchange: TokenExchange, experts: Experts, case: Case, which: Sequence[int], keep: bool = False
) -> Passed:
    """Forward and backward over the tokens of the ranks `which`, end to end."""
    parts = [inputs(case, rank) for rank in which]
    x, weights, up = (torch.cat(each) for each in zip(*parts, strict=True))
    x.requires_grad_()
    weights.requires_grad_()
    chosen = torch.cat([case.choices(rank) for rank in which])
    counts = torch.bincount(chosen.view(-1), minlength=case.experts)
    zero = torch.zeros(())
    stats = RoutingStats(counts, torch.zeros(case.experts), zero, zero, chosen.shape[0], 1)
    out = exchange(x, Routing(chosen, weights, stats), experts)
    torch.autograd.backward(out, up)
    gradients = [t.grad for t in (x, weights, experts.gate_up, experts.down)]
    if not keep:
        experts.zero_grad()
    assert all(g is not None for g in gradients)
    return Passed(out.detach(), *gradients)  # type: ignore[arg-type]


def mine(case: Case) -> Experts:
    """The experts that this rank holds."""
    whole, size, rank = all_experts(case), dist.get_world_size(), dist.get_rank()
    local = case.experts // size
    part = Experts(local, WIDTH, HIDDEN).to(case.dtype)
    with torch.no_grad():
        for own, all_of_them in zip(part.parameters(), whole.parameters(), strict=True):
            own.copy_(all_of_them[rank * local : (rank + 1) * local])
    return part


def whole_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def make(
    nodes: list[int] | None, elsewhere: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> TokenExchange:
    if nodes is None:
        return FlatExchange(whole_group(), elsewhere)
    return TopologyExchange(whole_group(), nodes, elsewhere)


def on_a_rank(cases: Sequence[Case], nodes: Sequence[list[int] | None]) -> list[list[Passed]]:
    """For each kind of exchange, each case's passes; all in one process group."""
    dist.init_process_group("gloo")
    results: list[list[Passed]] = []
    for each in nodes:
        watch = Stopwatch()
        exchange = make(each, watch.elsewhere)
        results.append([])
        for case in cases:
            before = watch.pauses
            passed = passes(exchange, mine(case), case, [dist.get_rank()])
            passed.pauses = watch.pauses - before
            results[-1].append(passed)
    return results


def assert_like_one_process(case: Case, by_rank: Sequence[Passed], tolerance: float) -> None:
    world = len(by_rank)
    expected = passes(local_exchange, all_experts(case), case, range(world))
    for name in ("out", "x", "weights", "gate_up", "down"):
        found = torch.cat([getattr(passed, name) for passed in by_rank])
        wanted = getattr(expected, name)
        try:
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def random_case(
    world: int, tokens: Sequence[int], top_k: int, experts: int = 8, seed: int = 0, **more: Any
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        [torch.randperm(experts, generator=generator)[:top_k].tolist() for _ in range(tokens[rank])]
        for rank in range(world)
    ]
    return Case(chosen, top_k, experts, seed, **more)


def adversarial(world: int) -> dict[str, Case]:
    return {
        "random, top 1": random_case(world, [13] * world, 1),
        "random, top 2": random_case(world, [13, 5, 9, 1], 2, seed=1),
        "random, top 4 of 16": random_case(world, [11] * world, 4, 16, seed=2),
        "every expert": random_case(world, [3] * world, 8, seed=3),
        "all tokens to one expert": Case([[[5]] * 7] * world, 1),
        "all tokens to the first two experts": Case([[[1, 0]] * 7] * world, 2),
        "the last rank has no tokens": random_case(world, [6] * (world - 1) + [0], 2, seed=4),
        "only the last rank has tokens": random_case(world, [0] * (world - 1) + [6], 2, seed=5),
        "no tokens at all": Case([[]] * world, 2),
        "all of a token's experts on the last ranks": Case([[[7, 6, 5, 4]] * 5] * world, 4),
        "one token": Case([[], [[3, 6]], [], []][:world], 2),
        "the same expert of every rank": Case([[[0, 2, 4, 6]] * 4] * world, 4),
    }


@pytest.mark.parametrize("world", [2, 4])
def test_results_and_gradients_are_those_of_one_process_with_all_experts(world: int) -> None:
    kinds = NODES if world == 4 else {"flat": None, "one node": [0, 0], "two nodes": [0, 1]}
    cases = adversarial(world)
    by_rank = ranks.run(on_a_rank, world, list(cases.values()), list(kinds.values()))
    for i, kind in enumerate(kinds):
        for j, (name, case) in enumerate(cases.items()):
            try:
                assert_like_one_process(case, [rank[i][j] for rank in by_rank], tolerance=1e-5)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {name}: {error}") from error


def test_bf16_stays_within_its_rounding() -> None:
    kinds = [None, [0, 0, 1, 1], [0, 1, 0, 0]]
    cases = [random_case(4, [12] * 4, 4, seed=s, dtype=torch.bfloat16) for s in range(2)]
    by_rank = ranks.run(on_a_rank, 4, cases, kinds)
    for i in range(len(kinds)):
        for j, case in enumerate(cases):
            assert by_rank[0][i][j].out.dtype == torch.bfloat16
            assert by_rank[0][i][j].weights.dtype == torch.float32
            assert_like_one_process(case, [rank[i][j] for rank in by_rank], tolerance=0.1)


def test_fp64_agrees_to_its_last_digits() -> None:
    kinds = [None, [0, 0, 1, 1]]
    case = random_case(4, [12] * 4, 4, dtype=torch.float64)
    by_rank = ranks.run(on_a_rank, 4, [case], kinds)
    for i in range(len(kinds)):
        assert_like_one_process(case, [rank[i][0] for rank in by_rank], tolerance=1e-12)


def test_a_second_run_gives_the_same_bits() -> None:
    kinds = [None, [0, 0, 1, 1], [0, 1, 0, 0]]
    cases = [random_case(4, [40, 0, 17, 64], 4, 16, seed=6, dtype=d) for d in (torch.float32, torch.bfloat16)]
    first, second = (ranks.run(on_a_rank, 4, cases, kinds) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            for p, q in zip(a, b, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(p.tensors(), q.tensors(), strict=True))


def test_the_stopwatch_pauses_around_each_collective_and_each_wait_for_sizes() -> None:
    kinds = [None, [0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 2, 3]]
    by_rank = ranks.run(on_a_rank, 4, [random_case(4, [9] * 4, 2)], kinds)
    pauses = [[kind[0].pauses for kind in rank] for rank in by_rank]
    flat, hop = 3 + 1 + 2, 4 + 1 + 3
    assert pauses == [
        [flat, 2 * hop, 2 * hop, hop],
        [flat, 2 * hop, hop, hop],
        [flat, 2 * hop, 2 * hop, hop],
        [flat, 2 * hop, 2 * hop, hop],
    ]


def _serve_cases() -> None:
    """Takes cases from rank 0's store until there are no more; one process group for all."""
    dist.init_process_group("gloo")
    store = TCPStore("127.0.0.1", int(os.environ["CASES_PORT"]), is_master=False)
    exchanges = [make(nodes) for nodes in NODES.values()]
    number = 0
    while (text := store.get(f"case {number}")) != b"end":
        case = pickle.loads(bytes.fromhex(text.decode()))
        passed = [passes(exchange, mine(case), case, [dist.get_rank()]) for exchange in exchanges]
        store.set(f"result {number} {dist.get_rank()}", pickle.dumps(passed).hex())
        number += 1


@st.composite
def routings(draw: st.DrawFn) -> Case:
    experts = draw(st.sampled_from([4, 8, 12]))
    top_k = draw(st.integers(1, min(5, experts)))
    # Few distinct choices make experts, ranks and nodes that nobody goes to likely.
    liked = draw(st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=experts, unique=True))
    token = st.permutations(liked).map(lambda order: list(order[:top_k]))
    chosen = [draw(st.lists(token, max_size=6)) for _ in range(4)]
    return Case(chosen, top_k, experts, draw(st.integers(0, 99)))


def test_any_routing_agrees_with_one_process() -> None:
    port = ranks.free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=40))
    number = 0

    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(routings())
    def agrees(case: Case) -> None:
        nonlocal number
        store.set(f"case {number}", pickle.dumps(case).hex())
        results = [store.get(f"result {number} {rank}").decode() for rank in range(4)]
        by_rank = [pickle.loads(bytes.fromhex(result)) for result in results]
        number += 1
        for i, kind in enumerate(NODES):
            try:
                assert_like_one_process(case, [rank[i] for rank in by_rank], tolerance=1e-5)
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from error

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(ranks.run, _serve_cases, 4, environment={"CASES_PORT": str(port)})
        try:
            agrees()
        finally:
            store.set(f"case {number}", "end")
        served.result()


class Block(nn.Module):
    """An exchange between two matrices, as in a layer."""

    def __init__(self, case: Case, exchange: TokenExchange) -> None:
        super().__init__()
        self.experts, self.exchange, self.case = mine(case), exchange, case
        self.before = nn.Parameter(torch.eye(WIDTH) + 0.1)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen = self.case.choices(dist.get_rank())
        counts = torch.bincount(chosen.view(-1), minlength=self.case.experts)
        zero = torch.zeros(())
        stats = RoutingStats(counts, torch.zeros(self.case.experts), zero, zero, chosen.shape[0], 1)
        x = torch.tanh(x @ self.before)
        return x + self.exchange(x, Routing(chosen, weights, stats), self.experts)


def _modes(cases: Sequence[Case], nodes: Sequence[list[int] | None], compiled: bool) -> list[list[Tensor]]:
    """Output and gradients of the block, as it is and then recomputed, for each exchange and case."""
    dist.init_process_group("gloo")
    results = []
    for each in nodes:
        exchange = make(each)
        for case in cases:
            block = Block(case, exchange)
            torch._dynamo.reset()
            other: Callable[..., Any] = torch.compile(block, backend="aot_eager") if compiled else block
            for call in (block, other):
                x, weights, up = inputs(case, dist.get_rank())
                x.requires_grad_()
                weights.requires_grad_()
                again = call is other
                out = checkpoint(call, x, weights, use_reentrant=False) if again else call(x, weights)
                out.backward(up)
                grads = [t.grad for t in (x, weights, *block.parameters()) if t.grad is not None]
                results.append([out.detach(), *grads])
                block.zero_grad()
    return results


@pytest.mark.parametrize("compiled", [False, True], ids=["recomputed", "compiled and recomputed"])
def test_activation_recomputation_changes_nothing(compiled: bool) -> None:
    cases = [random_case(2, [7, 4], 2), Case([[[0, 1]] * 3, []], 2)]
    for results in ranks.run(_modes, 2, cases, [None, [0, 1]], compiled):
        assert len(results) == 8
        for plain, other in zip(results[::2], results[1::2], strict=True):
            assert len(plain) == 6
            assert len(other) == 6
            for a, b in zip(plain, other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5 if compiled else 0, atol=1e-6 if compiled else 0)


def _sharded(cases: Sequence[Case], topology: bool) -> list[list[Tensor]]:
    """Gradients of the experts of this rank and of the one it shards them with by FSDP2, for each case."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert_shard", "expert"))
    group = mesh["expert"].get_group()
    exchange = TopologyExchange(group, [0, 1]) if topology else FlatExchange(group)
    results = []
    for case in cases:
        local = case.experts // group.size()
        experts = Experts(local, WIDTH, HIDDEN)
        with torch.no_grad():
            for own, whole in zip(experts.parameters(), all_experts(case).parameters(), strict=True):
                own.copy_(whole[group.rank() * local : (group.rank() + 1) * local])
        sharded = fully_shard(experts, mesh=mesh["expert_shard"])
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        passes(exchange, experts, case, [dist.get_rank()], keep=True)
        results.append([p.grad.full_tensor() for p in experts.parameters() if isinstance(p.grad, DTensor)])
    return results


@pytest.mark.parametrize("topology", [False, True], ids=["flat", "topology"])
def test_sharded_experts_get_the_sum_of_gradients_also_where_nobody_sends_a_token(topology: bool) -> None:
    cases = [
        random_case(4, [6, 3, 0, 5], 2, seed=7),
        Case([[[0, 1]] * 3, [[1, 2]] * 2, [[2, 0]], []], 2),
        Case([[], [], [[5, 1]], []], 2),
    ]
    by_rank = ranks.run(_sharded, 4, cases, topology)
    for number, case in enumerate(cases):
        expected = passes(local_exchange, all_experts(case), case, range(4))
        for rank, results in enumerate(by_rank):
            half = slice(rank % 2 * 4, rank % 2 * 4 + 4)
            wanted = [expected.gate_up[half], expected.down[half]]
            torch.testing.assert_close(results[number], wanted, rtol=1e-5, atol=1e-5)


def _alone() -> list[bool]:
    dist.init_process_group("gloo")
    case = random_case(1, [9], 2)
    expected = passes(local_exchange, all_experts(case), case, [0]).tensors()
    return [
        all(
            torch.equal(a, b)
            for a, b in zip(passes(make(n), mine(case), case, [0]).tensors(), expected, strict=True)
        )
        for n in (None, [4])
    ]


def test_a_group_of_one_rank_needs_no_exchange() -> None:
    assert ranks.run(_alone, 1) == [[True, True]]


def _refused() -> list[str]:
    dist.init_process_group("gloo")
    messages = []
    case = random_case(2, [4, 4], 2, experts=8)
    for attempt in (
        lambda: TopologyExchange(whole_group(), [0, 1, 2]),
        lambda: passes(make(None), mine(case), random_case(2, [4, 4], 2, experts=7), [dist.get_rank()]),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    for messages in ranks.run(_refused, 2):
        assert messages == [
            "3 nodes are named for the 2 ranks of the group",
            "7 experts cannot be divided evenly among 2 ranks",
        ]
