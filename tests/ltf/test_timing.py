"""A rank's own time, and who is slow."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltf.config import schema
from ltf.findings import Finding, Severity
from ltf.timing import JITTER_STEPS, HostClock, OwnSeconds, OwnWork, SlowRanks
from tests.ltf import ranks

CPU = torch.device("cpu")
NOISE = schema.Noise(slow_factor=1.3, slow_steps=5, jitter_factor=2.0)


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


def feed(
    slow: SlowRanks, steps: range, seconds: Callable[[int], list[float]]
) -> list[tuple[int, str, tuple[int, ...]]]:
    return [(f.step, f.kind, f.ranks) for f in found(slow, steps, seconds)]


def found(slow: SlowRanks, steps: range, seconds: Callable[[int], list[float]]) -> list[Finding]:
    return [finding for step in steps for finding in slow.observe(step, seconds(step))]


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
    assert slow.observe(1, [1.0, 1.0]) == []
