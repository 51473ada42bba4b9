"""A rank's own time, and who is slow."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltf.config import schema
from ltf.findings import Finding, Severity
from ltf.slow_ranks import JITTER_STEPS, SlowRanks
from ltf.timing import HostClock, OwnSeconds, OwnWork
from tests.ltf import ranks

CPU = torch.device("cpu")
NOISE = schema.Noise(slow_factor=1.3, slow_steps=5, jitter_factor=2.0, lost_seconds=0)


class Watch:
    """A clock that goes on only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def own(self, *modules: nn.Module) -> OwnWork:
        return OwnWork(modules, CPU, HostClock(lambda: self.now))


class Slow(nn.Module):
    """Works for `work` seconds, and waits for `waits` inside `elsewhere` if it was given one."""

    def __init__(self, work: Callable[[float], None], seconds: float, waits: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.work, self.seconds, self.waits = work, seconds, waits
        self.elsewhere: Callable[[], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.work(self.seconds)
        if self.elsewhere is not None:
            with self.elsewhere():
                self.work(self.waits)
            self.work(self.seconds)
        y: torch.Tensor = self.linear(x)
        return y


def test_the_forward_passes_are_timed_and_rows_counted_once() -> None:
    watch = Watch()
    blocks = [Slow(watch.work, 3.0), Slow(watch.work, 4.0)]
    own = watch.own(*blocks)
    for rows in (2, 3):
        x = torch.ones(rows, 7, 4)
        for block in blocks:
            x = block(x)
            # Between the blocks the rank waits for parameters.
            watch.work(100.0)
    assert own.take() == OwnSeconds(14.0, 5)
    assert own.take() == OwnSeconds(0.0, 0)


def test_nothing_measured_is_not_a_number() -> None:
    assert math.isnan(OwnSeconds(0.0, 0).per_row)
    assert OwnSeconds(1.0, 4).per_row == 0.25


def test_work_that_others_send_is_counted_apart() -> None:
    watch = Watch()
    attention, experts = Slow(watch.work, 3.0), Slow(watch.work, 40.0)
    own = OwnWork([attention, experts], CPU, HostClock(lambda: watch.now), uneven=[experts])
    experts(attention(torch.ones(2, 4)))
    taken = own.take()
    assert taken == OwnSeconds(43.0, 2, uneven=40.0)
    assert (taken.per_row, taken.even_per_row) == (21.5, 1.5)
    assert own.take() == OwnSeconds(0.0, 0)


def test_where_all_work_is_uneven_nothing_can_be_compared() -> None:
    assert math.isnan(OwnSeconds(4.0, 2, uneven=4.0).even_per_row)


def test_waiting_for_others_is_not_own_work() -> None:
    watch = Watch()
    block = Slow(watch.work, 3.0, waits=200.0)
    own = watch.own(block)
    block.elsewhere = own.elsewhere
    block(torch.ones(1, 4))
    assert own.take() == OwnSeconds(6.0, 1)


def test_elsewhere_outside_a_forward_pass_is_nothing() -> None:
    watch = Watch()
    own = watch.own(Slow(watch.work, 1.0))
    with own.elsewhere():
        watch.work(1.0)
    assert own.take() == OwnSeconds(0.0, 0)


def test_a_module_inside_another_is_not_counted_twice() -> None:
    watch = Watch()
    inner = Slow(watch.work, 5.0)
    outer = nn.Sequential(inner)
    own = watch.own(outer, inner)
    outer(torch.ones(1, 4))
    assert own.take() == OwnSeconds(5.0, 1)


@pytest.mark.parametrize("waits", [None, 7.0])
def test_a_backward_pass_that_computes_again_is_not_counted(waits: float | None) -> None:
    watch = Watch()
    block = Slow(watch.work, 5.0, waits or 0.0)
    own = watch.own(block)
    block.elsewhere = None if waits is None else own.elsewhere
    y = checkpoint(block, torch.ones(3, 4, requires_grad=True), use_reentrant=False)
    assert isinstance(y, torch.Tensor)
    forward = watch.now
    torch.autograd.backward(y.sum())
    # The block did run again.
    assert watch.now == 2 * forward
    assert own.take() == OwnSeconds(5.0 if waits is None else 10.0, 3)


def test_an_evaluation_is_not_counted() -> None:
    watch = Watch()
    block = Slow(watch.work, 1.0)
    own = watch.own(block)
    with torch.no_grad():
        block(torch.ones(1, 4))
    assert own.take() == OwnSeconds(0.0, 0)


def test_a_forward_pass_that_fails_leaves_the_watch_usable() -> None:
    watch = Watch()
    block = Slow(watch.work, 3.0)
    own = watch.own(block)
    with pytest.raises(RuntimeError):
        block(torch.ones(1, 5))
    own.take()
    block(torch.ones(2, 4))
    assert own.take() == OwnSeconds(3.0, 2)


def test_the_watch_can_be_taken_off() -> None:
    watch = Watch()
    block = Slow(watch.work, 1.0)
    own = watch.own(block)
    own.remove()
    block(torch.ones(1, 4))
    assert own.take() == OwnSeconds(0.0, 0)


class Works(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.elsewhere: Callable[[], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.elsewhere is not None:
            with self.elsewhere():
                x = x * 2
        return torch.relu(x)


@pytest.mark.parametrize("how", ["module", "forward"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_compiled_blocks_are_timed_and_compute_the_same(how: str, elsewhere: bool) -> None:
    block, x = Works(), torch.randn(8, 64)
    expected = torch.relu(block.linear(x) * (2 if elsewhere else 1))
    if how == "module":
        block.compile(backend="eager")
    else:
        block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]
    watch = OwnWork([block], CPU)
    if elsewhere:
        block.elsewhere = watch.elsewhere
    for _ in range(3):
        y = block(x)
        torch.testing.assert_close(y, expected)
        torch.autograd.backward(y.sum())
        taken = watch.take()
        assert taken.rows == 8
        assert taken.seconds > 0


def sharded(work: tuple[float, float], recompute: bool, watched_first: bool) -> tuple[float, int, float]:
    """Own seconds, rows and the wall time of a forward pass of two sharded blocks; rank r works work[r]."""
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        blocks = [Slow(time.sleep, work[dist.get_rank()]) for _ in range(2)]
        wrapped = [checkpoint_wrapper(block) if recompute else block for block in blocks]
        model = nn.Sequential(*wrapped)
        watch = OwnWork(blocks, CPU) if watched_first else None
        for block in wrapped:
            fully_shard(block)
        fully_shard(model)
        watch = watch or OwnWork(blocks, CPU)
        for _ in range(2):
            dist.barrier()
            watch.take()
            began = time.perf_counter()
            loss = model(torch.ones(3, 4)).sum()
            wall = time.perf_counter() - began
            loss.backward()
            taken = watch.take()
        return taken.seconds, taken.rows, wall
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("recompute", "watched_first"), [(False, False), (True, False), (False, True)])
def test_between_fsdps_collectives_the_fast_rank_is_seen_as_fast(
    recompute: bool, watched_first: bool
) -> None:
    fast, slow = ranks.run(sharded, 2, (0.02, 0.3), recompute, watched_first)
    assert (fast[1], slow[1]) == (3, 3)
    # Once each block, although recomputation runs them twice.
    assert 0.6 <= slow[0] < 0.9
    # It waited in the gathering of the second block's parameters for the slow one, and that was not its work.
    assert 0.04 <= fast[0] < 0.3 < fast[2]


def routed_to_rank_0(tokens: int) -> tuple[OwnSeconds, int]:
    """Own time by a clock that only modules move, and the experts' rows, where all tokens want rank 0's."""
    from ltf.config.schema import Parallel
    from ltf.model.decoder import Decoder
    from ltf.model.init import init_weights
    from ltf.model.moe import MoE
    from ltf.parallel.exchange import FlatExchange
    from ltf.parallel.world import join
    from ltf.train.loop import uneven
    from tests.ltf.model.shapes import MOE

    world = join(Parallel(expert=2), "cpu")
    try:
        watch, seen = Watch(), []

        def working(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].shape[0])
            watch.work(float(args[0].shape[0]))

        model = Decoder(MOE)
        init_weights(model, seed=1)
        timed: list[nn.Module] = []
        assert MOE.moe is not None
        half = MOE.moe.experts // 2
        for _, block in model.blocks():
            timed.append(block.attention)
            if not isinstance(block.ffn, MoE):
                continue
            with torch.no_grad():
                for parameter in block.ffn.experts.parameters():
                    parameter.data = parameter.data[:half].clone()
            block.ffn.router.register_forward_hook(to_the_first_experts)
            timed += [block.ffn.router, block.ffn.experts]
        own = OwnWork(timed, CPU, HostClock(lambda: watch.now), uneven=uneven(timed))
        exchange = FlatExchange(world.mesh.get_group("ep"), own.elsewhere)
        for _, block in model.blocks():
            block.attention.register_forward_pre_hook(lambda _, args: watch.work(float(args[0].shape[0])))
            if isinstance(block.ffn, MoE):
                block.ffn.exchange = exchange
                block.ffn.experts.register_forward_pre_hook(working)
        model(torch.arange(tokens).view(1, tokens) % MOE.vocab_size)
        return own.take(), sum(seen)
    finally:
        world.close()


def to_the_first_experts(router: nn.Module, args: object, routing: Any) -> Any:
    """Every token's choice becomes expert 0, 1 and so on, in whatever order of weight."""
    top_k = routing.experts.shape[1]
    experts = torch.arange(top_k).expand_as(routing.experts).contiguous()
    counts = torch.zeros_like(routing.stats.tokens_per_expert)
    counts[:top_k] = routing.experts.shape[0]
    return routing._replace(experts=experts, stats=routing.stats._replace(tokens_per_expert=counts))


def test_of_an_expert_group_the_rank_whose_experts_all_want_has_more_work_and_is_not_slow() -> None:
    (busy, rows), (idle, none) = ranks.run(routed_to_rank_0, 2, 8)
    assert rows > 0 == none
    assert busy.uneven == rows
    assert busy.per_row > idle.per_row
    assert busy.even_per_row == idle.even_per_row > 0
    assert SlowRanks(NOISE.model_copy(update={"slow_steps": 1}), "aa").observe(1, [busy, idle]) == []


def feed(
    slow: SlowRanks, steps: range, seconds: Callable[[int], list[float]]
) -> list[tuple[int, str, tuple[int, ...]]]:
    return [(f.step, f.kind, f.ranks) for f in found(slow, steps, seconds)]


def found(slow: SlowRanks, steps: range, seconds: Callable[[int], list[float]]) -> list[Finding]:
    return [finding for step in steps for finding in slow.observe(step, of_one_row(seconds(step)))]


def of_one_row(seconds: list[float]) -> list[OwnSeconds]:
    return [OwnSeconds(each, 1) for each in seconds]


def test_a_rank_that_becomes_slow_is_found_with_factor_and_since_when_and_once() -> None:
    findings = found(
        SlowRanks(NOISE, "aaaa"), range(1, 40), lambda step: [1.0, 1.0, 2.0 if step >= 10 else 1.0, 1.0]
    )
    (finding,) = findings
    assert (finding.kind, finding.severity, finding.ranks) == ("slow_rank", Severity.WARNING, (2,))
    assert finding.evidence["since"] == 10
    assert finding.evidence["factor"] == 2.0
    assert 10 < finding.step <= 10 + NOISE.slow_steps
    assert "2.00 times" in finding.message


def test_of_two_ranks_the_slow_one_is_measured_against_the_other() -> None:
    (finding,) = found(SlowRanks(NOISE, "aa"), range(1, 10), lambda step: [1.0, 1.5])
    assert (finding.ranks, finding.evidence["factor"]) == ((1,), 1.5)


def test_a_rank_that_recovers_is_told_and_can_be_found_again() -> None:
    told = feed(
        SlowRanks(NOISE, "aaa"),
        range(1, 60),
        lambda step: [1.0, 1.0, 2.0 if step < 20 or step >= 40 else 1.0],
    )
    assert [kind for _, kind, _ in told] == ["slow_rank", "slow_rank.over", "slow_rank"]


def test_a_rank_about_the_limit_is_not_told_again_and_again() -> None:
    told = feed(
        SlowRanks(NOISE, "aaa"), range(1, 200), lambda step: [1.0, 1.0, 1.3 + 0.05 * (-1) ** (step // 7)]
    )
    assert [kind for _, kind, _ in told] == ["slow_rank"]


def test_healthy_noise_is_no_finding() -> None:
    chance = random.Random(1)
    assert not feed(
        SlowRanks(schema.Noise(), "a" * 16),
        range(1, 1000),
        lambda step: [chance.lognormvariate(0, 0.1) for _ in range(16)],
    )


def test_stages_with_more_work_are_compared_among_themselves_only() -> None:
    groups = ["first", "first", "last", "last"]
    assert not feed(SlowRanks(NOISE, groups), range(1, 50), lambda step: [1.0, 1.0, 3.0, 3.0])
    assert feed(SlowRanks(NOISE, groups), range(1, 50), lambda step: [1.0, 1.0, 3.0, 6.0]) == [
        (5, "slow_rank", (3,))
    ]


def test_a_rank_without_peers_is_not_judged() -> None:
    assert not feed(SlowRanks(NOISE, "ab"), range(1, 50), lambda step: [1.0, 9.0])


def test_a_rank_that_measured_nothing_is_passed_over() -> None:
    nothing = float("nan")
    assert not feed(SlowRanks(NOISE, "aaa"), range(1, 50), lambda step: [1.0, nothing, 0.0])
    assert feed(SlowRanks(NOISE, "aaa"), range(1, 10), lambda step: [1.0, nothing, 2.0]) == [
        (5, "slow_rank", (2,))
    ]


def test_slow_steps_that_come_and_go_are_jitter() -> None:
    (finding,) = found(
        SlowRanks(NOISE, "aaaa"),
        range(1, 150),
        lambda step: [1.0, 3.0 if step % 10 == 0 else 1.0, 1.0, 1.0],
    )
    assert (finding.kind, finding.ranks, finding.step) == ("jitter", (1,), JITTER_STEPS)
    assert (finding.evidence["since"], finding.evidence["factor"]) == (10, 3.0)


def test_jitter_that_ends_is_told() -> None:
    told = feed(
        SlowRanks(NOISE, "aa"),
        range(1, 400),
        lambda step: [1.0, 3.0 if step % 10 == 0 and step < 200 else 1.0],
    )
    assert [kind for _, kind, _ in told] == ["jitter", "jitter.over"]


def test_a_rank_that_becomes_slow_for_good_is_not_called_unsteady() -> None:
    told = feed(
        SlowRanks(NOISE, "aaaa"), range(1, 400), lambda step: [1.0, 1.0, 1.0, 3.0 if step > 150 else 1.0]
    )
    assert [kind for _, kind, _ in told] == ["slow_rank"]


def test_one_slow_first_step_is_no_jitter() -> None:
    assert not feed(
        SlowRanks(NOISE, "aa"), range(1, 200), lambda step: [90.0, 1.0] if step == 1 else [1.0, 1.0]
    )


def test_a_rank_with_the_favoured_experts_is_not_slow() -> None:
    slow = SlowRanks(NOISE, "aa")
    loads = [OwnSeconds(1.0, 1, uneven=0.5), OwnSeconds(9.0, 1, uneven=8.5)]
    assert [finding for step in range(50) for finding in slow.observe(step, loads)] == []


def test_a_rank_that_is_slow_in_two_steps_of_three_by_chance_is_not_called_slow() -> None:
    told = feed(SlowRanks(NOISE, "aa"), range(1, 400), lambda step: [1.0, 0.8 if step % 3 == 0 else 1.6])
    assert told == []


def test_what_has_cost_too_little_is_told_when_it_has_cost_enough() -> None:
    settings = NOISE.model_copy(update={"lost_seconds": 20.0})
    (finding,) = found(
        SlowRanks(settings, "aaa"), range(1, 60), lambda step: [1.0, 1.0, 2.0 if step >= 10 else 1.0]
    )
    # A second is lost in each step from the tenth on.
    assert (finding.kind, finding.step, finding.evidence["since"]) == ("slow_rank", 29, 10)
    assert finding.evidence["lost_seconds"] == 20.0


def test_what_passes_before_it_has_cost_enough_is_never_told() -> None:
    settings = NOISE.model_copy(update={"lost_seconds": 20.0})
    told = feed(
        SlowRanks(settings, "aaa"), range(1, 400), lambda step: [1.0, 1.0, 1.9 if step % 40 < 15 else 1.0]
    )
    assert told == []


def test_jitter_that_costs_too_little_is_not_told_yet() -> None:
    settings = NOISE.model_copy(update={"lost_seconds": 30.0})
    (finding,) = found(
        SlowRanks(settings, "aaaa"),
        range(1, 300),
        lambda step: [1.0, 3.0 if step % 10 == 0 else 1.0, 1.0, 1.0],
    )
    # Two seconds every tenth step: the first 100 steps cost 20, and 30 are reached at step 150.
    assert (finding.kind, finding.step, finding.evidence["lost_seconds"]) == ("jitter", 150, 30.0)


def test_where_all_ranks_are_unsteady_none_is_to_blame() -> None:
    told = feed(
        SlowRanks(NOISE, "aaaa"),
        range(1, 400),
        lambda step: [3.0 if (step + r) % 10 == 0 else 1.0 for r in range(4)],
    )
    assert told == []


@pytest.mark.parametrize("ranks_of_stage", [2, 3, 4, 5])
def test_peers_are_all_others_whatever_their_number(ranks_of_stage: int) -> None:
    seconds = [1.0, 2.0, 4.0, 8.0, 16.0][:ranks_of_stage]
    findings = found(SlowRanks(NOISE, "a" * ranks_of_stage), range(1, 6), lambda step: seconds)
    expected = {
        rank: own / statistics.median(seconds[:rank] + seconds[rank + 1 :])
        for rank, own in enumerate(seconds)
    }
    assert {f.ranks[0]: f.evidence["factor"] for f in findings} == {
        rank: factor for rank, factor in expected.items() if factor >= 1.3
    }


def test_a_restored_state_goes_on_as_if_nothing_had_happened() -> None:
    def seconds(step: int) -> list[float]:
        return [1.0, 3.0 if step % 10 == 0 else 1.0, 2.0 if 20 <= step < 120 else 1.0]

    whole, first, second = (SlowRanks(NOISE, "aaa") for _ in range(3))
    expected = feed(whole, range(1, 200), seconds)
    begun = feed(first, range(1, 110), seconds)
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + feed(second, range(110, 200), seconds) == expected
    assert len(expected) == 3


def test_a_state_of_another_number_of_ranks_is_left() -> None:
    slow = SlowRanks(NOISE, "aa")
    slow.restore(SlowRanks(NOISE, "aaa").state())
    assert slow.observe(1, of_one_row([1.0, 1.0])) == []
