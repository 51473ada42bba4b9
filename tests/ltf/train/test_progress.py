"""Progress as a checkpoint holds it."""

from __future__ import annotations

import json

import pytest

from ltf.train.progress import Progress


def test_progress_survives_json() -> None:
    progress = Progress(5, 40, 320, 1, (3,), {"spikes": {"losses": [1.5]}})
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_progress_of_another_version_is_refused_by_the_fields_it_lacks() -> None:
    with pytest.raises(ValueError, match="lacks next_sample, tokens"):
        Progress.from_json({"step": 1, "skipped": 0, "roll_backs": [], "watches": {}})


def test_a_skipped_step_uses_its_samples_and_trains_on_no_token() -> None:
    after = Progress(5, 40, 320).after_step(8, 64, skipped=True)
    assert after == Progress(6, 48, 320, skipped=1)


def test_after_a_roll_back_the_step_repeats_and_the_data_does_not() -> None:
    saved, failed = Progress(100, 800, 6400), Progress(120, 960, 7680, roll_backs=(50,))
    again = saved.rolled_back_from(failed, samples=8)
    assert (again.step, again.next_sample, again.tokens) == (100, 968, 6400)
    assert again.roll_backs == (50, 120)
