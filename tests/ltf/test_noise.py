"""Garbage collection at fixed steps, and the page cache."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltf.findings import Severity
from ltf.noise import SteadyCollection, drop_page_cache


class Knot:
    """Garbage that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _python_as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def collections(steps: range, every: int | None) -> dict[int, int]:
    """How often the collector began by step, while each makes more garbage than makes Python collect."""
    seen: dict[int, int] = {}
    step = 0

    def watch(phase: str, info: dict[str, int]) -> None:
        seen[step] = seen.get(step, 0) + (phase == "start")

    with SteadyCollection(every) as steady:
        gc.callbacks.append(watch)
        try:
            for step in steps:
                for _ in range(3 * gc.get_threshold()[0]):
                    Knot()
                steady.after(step)
        finally:
            gc.callbacks.remove(watch)
    return seen


def test_garbage_is_collected_at_the_interval_and_never_between() -> None:
    assert collections(range(1, 8), every=3) == {3: 1, 6: 1}


def test_without_an_interval_python_collects_as_it_likes() -> None:
    assert set(collections(range(1, 4), every=None)) == {1, 2, 3}


def test_what_became_garbage_is_gone_after_the_interval() -> None:
    with SteadyCollection(2) as steady:
        knot = weakref.ref(Knot())
        assert steady.after(1) is None
        assert knot() is not None
        seconds = steady.after(2)
        assert knot() is None
    assert seconds is not None
    assert seconds > 0


def test_the_time_that_a_collection_took_is_told() -> None:
    times = iter([10.0, 10.25])
    with SteadyCollection(5, clock=lambda: next(times)) as steady:
        assert steady.after(5) == 0.25


def test_leaving_gives_python_its_collector_back() -> None:
    def fail() -> None:
        with SteadyCollection(1):
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with SteadyCollection(1):
        pass
    assert not gc.isenabled()


def test_the_page_cache_is_dropped_after_dirty_pages_were_written(tmp_path: Path) -> None:
    asked = tmp_path / "drop_caches"
    asked.write_text("")
    at_sync: list[str] = []
    finding = drop_page_cache(asked, sync=lambda: at_sync.append(asked.read_text()))
    assert at_sync == [""]
    assert asked.read_text() == "1\n"
    assert finding.kind == "noise.page_cache_dropped"


def test_a_kernel_without_such_a_file_is_told_and_the_file_is_not_made(tmp_path: Path) -> None:
    asked = tmp_path / "drop_caches"
    finding = drop_page_cache(asked, sync=lambda: None)
    assert (finding.kind, finding.severity) == ("noise.page_cache_refused", Severity.INFO)
    assert finding.evidence["errno"] == errno.ENOENT
    assert not asked.exists()


def test_a_refused_write_is_told_with_its_reason() -> None:
    # The device that refuses every write with "no space left".
    finding = drop_page_cache(Path("/dev/full"), sync=lambda: None)
    assert finding.severity is Severity.INFO
    assert os.strerror(errno.ENOSPC) in finding.message
