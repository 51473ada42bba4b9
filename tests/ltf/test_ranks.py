"""The ranks that other tests run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ltf import ranks


def _sum_of_ranks(offset: float) -> float:
    dist.init_process_group("gloo")
    value = torch.tensor([offset + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(value)
    return float(value)


def _rank_one_raises() -> int:
    if os.environ["RANK"] == "1":
        raise ValueError("a plain mistake")
    time.sleep(60)
    return 0


def _rank_one_exits() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def _never_done() -> None:
    time.sleep(60)


def test_ranks_find_each_other_and_answer_in_order_again_and_again() -> None:
    assert ranks.run(_sum_of_ranks, 2, 0.5) == [2.0, 2.0]
    assert ranks.run(_sum_of_ranks, 2, 1.0) == [3.0, 3.0]


def test_a_rank_that_raises_ends_the_call_with_its_traceback() -> None:
    with pytest.raises(ranks.RankFailed, match=r"rank 1: (?s:.*)ValueError: a plain mistake"):
        ranks.run(_rank_one_raises, 2)


def test_a_rank_that_dies_ends_the_call_with_its_exit_code() -> None:
    with pytest.raises(ranks.RankFailed, match="rank 1: died with exit code 7"):
        ranks.run(_rank_one_exits, 2)


def test_ranks_that_hang_are_ended_and_their_stacks_shown() -> None:
    ranks.run(_sum_of_ranks, 1, 0.0)  # the process is there from now on, however slowly it came up
    with pytest.raises(ranks.RankFailed, match=r"not done after 5 s(?s:.*)_never_done"):
        ranks.run(_never_done, 1, timeout=5)
