"""When state may change, which state the ranks agree on, and what is told of a save."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ltf.checkpoint.load import load_tensors
from ltf.checkpoint.pieces import Piece
from ltf.checkpoint.saver import GaveUp, LeaveTraining, Saved, Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.findings import Finding
from tests.ltf import ranks
from tests.ltf.checkpoint.toy import join, settings


class Weights(nn.Module):
    """Every element holds the version, so that a checkpoint shows which state it is of."""

    def __init__(self, elements: int = 1000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    @torch.no_grad()
    def set(self, version: int) -> None:
        self.weight.fill_(float(version))


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def told(saver: Saver, count: int) -> list[Saved | Finding]:
    found: list[Saved | Finding] = []

    def enough() -> bool:
        found.extend(saver.poll())
        return len(found) >= count

    until(enough)
    return found


def step(saver: Saver, weights: Weights, version: int) -> None:
    saver.before_update()
    weights.set(version)
    saver.finished_update(version, {"step": version})


def saved_value(folder: Path) -> tuple[int, set[float]]:
    entry = Store(folder).latest()
    assert entry is not None
    manifest, tensors = load_tensors(entry)
    return manifest.version, set(tensors["weight"].tolist())


class _Slow(State):
    """Its copy begins only when the test says so."""

    def __init__(self, weights: Weights) -> None:
        super().__init__([weights])
        self.go = threading.Event()

    def pieces(self) -> list[Piece]:
        self.go.wait()
        return super().pieces()


def test_an_update_waits_for_the_copy_and_what_it_changes_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weights = Weights()
    state = _Slow(weights)
    with Saver(Store(tmp_path), state, settings(), config={}, signals=False) as saver:
        saver.finished_update(0, {})
        assert saver.before_update() < 0.1
        weights.set(1)
        saver.finished_update(1, {})
        assert saver.request() < 0.1
        threading.Timer(0.3, state.go.set).start()
        assert saver.before_update() > 0.2
        weights.set(2)
        saver.finished_update(2, {})
        saver.wait()
        assert saved_value(tmp_path) == (1, {1.0})


def test_a_large_state_changed_right_behind_the_gate_is_saved_as_it_was(tmp_path: Path) -> None:
    weights = Weights(10_000_000)
    with Saver(Store(tmp_path), State([weights]), settings(), config={}, signals=False) as saver:
        saver.finished_update(0, {})
        for version in (1, 2, 3):
            step(saver, weights, version)
        saver.request()
        step(saver, weights, 4)
        saver.wait()
        assert saved_value(tmp_path) == (3, {3.0})


def test_in_the_foreground_a_request_returns_when_it_is_durable(tmp_path: Path) -> None:
    weights = Weights()
    options = settings(background=False)
    with Saver(Store(tmp_path), State([weights]), options, config={}, signals=False) as saver:
        saver.finished_update(7, {})
        saver.request()
        assert saved_value(tmp_path) == (7, {0.0})


class _SlowDisk(Store):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()

    def begin(self, folder: Path) -> None:
        self.go.wait()
        super().begin(folder)


def test_a_request_while_the_last_is_still_being_written_is_skipped_and_told(tmp_path: Path) -> None:
    weights, store = Weights(), _SlowDisk(tmp_path)
    with Saver(store, State([weights]), settings(), config={}, signals=False) as saver:
        saver.finished_update(1, {})
        saver.request()
        step(saver, weights, 2)
        saver.request()
        time.sleep(0.2)
        store.go.set()
        first, second = told(saver, 2)
        step(saver, weights, 3)
        saver.request()
        third = told(saver, 1)[0]
    assert isinstance(first, Saved)
    assert isinstance(second, Finding)
    assert isinstance(third, Saved)
    assert (first.version, second.step, second.kind, third.version) == (1, 2, "checkpoint.skipped", 3)


def test_a_version_that_is_saved_is_not_written_again(tmp_path: Path) -> None:
    weights = Weights()
    with Saver(Store(tmp_path), State([weights]), settings(), config={}, signals=False) as saver:
        saver.finished_update(1, {})
        saver.request()
        saver.wait()
        assert len(saver.poll()) == 1
        before = (tmp_path / "step-00000001").stat()
        saver.request()
        saver.wait()
        assert saver.poll() == []
        assert (tmp_path / "step-00000001").stat() == before
    with Saver(Store(tmp_path), State([weights]), settings(), config={}, signals=False, saved=1) as saver:
        saver.finished_update(1, {})
        saver.request()
        saver.wait()
        assert saver.poll() == []


def test_minutes_pass_and_a_checkpoint_is_made(tmp_path: Path) -> None:
    now = [0.0]
    saver = Saver(
        Store(tmp_path),
        State([Weights()]),
        settings(every_minutes=10),
        config={},
        signals=False,
        clock=lambda: now[0],
    )
    with saver:
        saver.finished_update(4, {})
        time.sleep(0.15)
        assert saver.poll() == []
        now[0] = 601.0
        (saved,) = told(saver, 1)
    assert isinstance(saved, Saved)
    assert (saved.version, saved.reason) == (4, "time")


def test_saving_fails_for_too_long_and_no_further_update_is_made(tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "file").touch()
    saver = Saver(
        Store(tmp_path / "file" / "checkpoints"),
        State([Weights()]),
        settings(give_up_after_minutes=60),
        config={},
        signals=False,
        clock=lambda: now[0],
        retry_seconds=600,
    )
    with saver:
        told(saver, 1)  # What dead processes left cannot be looked for either.
        now[0] = 5000.0
        saver.finished_update(4, {})
        saver.request()
        (failed,) = told(saver, 1)
        assert isinstance(failed, Finding)
        assert failed.kind == "checkpoint.failed"
        assert "Not a directory" in failed.message
        now[0] += 601
        (again,) = told(saver, 1)
        assert isinstance(again, Finding)
        assert again.evidence["reason"] == "retry"
        assert saver.before_update() < 1
        saver.finished_update(5, {})
        now[0] += 3000
        (gave_up,) = told(saver, 1)
        assert isinstance(gave_up, Finding)
        assert gave_up.kind == "checkpoint.gave_up"
        assert "60.0 minutes" in gave_up.message
        with pytest.raises(GaveUp, match="stops at step 5"):
            saver.before_update()


def test_a_success_forgets_what_failed_before(tmp_path: Path) -> None:
    now = [0.0]
    blocked = tmp_path / "checkpoints"
    weights = Weights()
    saver = Saver(
        Store(blocked),
        State([weights]),
        settings(give_up_after_minutes=60),
        config={},
        signals=False,
        clock=lambda: now[0],
        retry_seconds=None,
    )
    with saver:
        blocked.touch()
        saver.finished_update(1, {})
        saver.request()
        told(saver, 1)
        blocked.unlink()
        now[0] += 3500
        step(saver, weights, 2)
        saver.request()
        (saved,) = told(saver, 1)
        assert isinstance(saved, Saved)
        now[0] += 3500
        time.sleep(0.15)
        assert saver.before_update() < 1
        saver.finished_update(3, {})


def test_ranks_inside_a_step_save_its_state_at_once(tmp_path: Path) -> None:
    assert ranks.run(_inside_a_step, 2, tmp_path) == [[5], [5]]
    assert saved_value(tmp_path) == (5, {5.0})


def _inside_a_step(folder: Path) -> list[int]:
    join()
    weights = Weights()
    with Saver(Store(folder), State([weights]), settings(), config={}) as saver:
        weights.set(5)
        saver.finished_update(5, {})
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        versions = [saved.version for saved in told(saver, 1) if isinstance(saved, Saved)]
        # Training goes on.
        step(saver, weights, 6)
        dist.barrier()
    return versions


def test_a_rank_one_update_behind_catches_up_and_the_one_ahead_waits(tmp_path: Path) -> None:
    results = ranks.run(_one_behind, 2, tmp_path)
    assert results == [[6], [6]]
    assert saved_value(tmp_path) == (6, {6.0})


def _one_behind(folder: Path) -> list[int]:
    join()
    weights = Weights()
    with Saver(Store(folder), State([weights]), settings(), config={}, signals=False) as saver:
        weights.set(5)
        saver.finished_update(5, {})
        dist.barrier()  # As the gradients' norm of step 6 would.
        if dist.get_rank() == 0:
            step(saver, weights, 6)
            saver.save_soon("test")
        else:
            time.sleep(0.5)  # Long enough for the order to come in most runs; the result is the same if not.
            assert saver.poll() == []
            step(saver, weights, 6)
        return [saved.version for saved in told(saver, 1) if isinstance(saved, Saved)]


def test_demands_and_requests_in_any_order_never_lock_two_ranks(tmp_path: Path) -> None:
    first, second = ranks.run(_many, 2, tmp_path)
    assert first == second
    assert len(first) > 4


def _many(folder: Path) -> list[tuple[str, int]]:
    join()
    weights = Weights()
    options = settings(keep_last=3)
    found: list[Saved | Finding] = []
    with Saver(Store(folder), State([weights]), options, config={}, signals=False) as saver:
        saver.finished_update(0, {})
        for version in range(1, 31):
            if (version * 7 + dist.get_rank() * 3) % 11 == 0:
                saver.save_soon(f"rank {dist.get_rank()}")
            time.sleep(0.002 * ((version * (3 + dist.get_rank())) % 5))
            dist.barrier()
            step(saver, weights, version)
            if version % 6 == 0:
                saver.request()
        saver.wait()
        found = saver.poll()
    found += saver.poll()
    for entry in Store(folder).entries():
        _, tensors = load_tensors(entry)
        assert set(tensors["weight"].tolist()) == {float(entry.version)}
    return [(type(f).__name__, f.version if isinstance(f, Saved) else f.step) for f in found]


def test_what_cannot_be_saved_is_told_to_all_and_training_goes_on(tmp_path: Path) -> None:
    for kind, failing, step_after in ranks.run(_one_fails, 2, tmp_path):
        assert (kind, failing, step_after) == ("checkpoint.failed", (1,), 2)


class _FailsOnRankOne(State):
    def pieces(self) -> list[Piece]:
        if dist.get_rank() == 1:
            raise MemoryError("no room for the copy")
        return super().pieces()


def _one_fails(folder: Path) -> tuple[str, tuple[int, ...], int]:
    join()
    weights = Weights()
    with Saver(Store(folder), _FailsOnRankOne([weights]), settings(), config={}, signals=False) as saver:
        saver.finished_update(1, {})
        saver.request()
        (finding,) = told(saver, 1)
        step(saver, weights, 2)
        assert isinstance(finding, Finding)
        assert "no room for the copy" in finding.message
        return finding.kind, finding.ranks, 2


def test_after_closing_no_update_is_made_unnoticed(tmp_path: Path) -> None:
    saver = Saver(Store(tmp_path), State([Weights()]), settings(), config={}, signals=False)
    saver.finished_update(1, {})
    saver.close()
    with pytest.raises(LeaveTraining, match="saving has ended"):
        saver.before_update()
