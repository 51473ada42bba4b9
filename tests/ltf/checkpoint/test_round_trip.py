"""What is saved comes back bit for bit, in the same layout and in others."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ltf.checkpoint.load import Loaded, load, load_model
from ltf.checkpoint.saver import Saved
from ltf.checkpoint.store import Store
from tests.ltf import ranks
from tests.ltf.checkpoint.toy import Toy, join, same, saver, train, whole

SAVE_AT = 3
LAST = 6


def test_a_resumed_run_goes_on_bit_for_bit_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first, second = _uninterrupted_and_resumed(tmp_path)
    assert first == second


def test_a_resumed_run_goes_on_bit_for_bit_on_two_ranks(tmp_path: Path) -> None:
    for first, second in ranks.run(_two_ranks, 2, tmp_path):
        assert first == second


def _two_ranks(folder: Path) -> tuple[list[float], list[float]]:
    join()
    torch.manual_seed(5 + dist.get_rank())
    return _uninterrupted_and_resumed(folder)


def _uninterrupted_and_resumed(folder: Path) -> tuple[list[float], list[float]]:
    toy = Toy()
    with saver(folder, toy) as writing:
        losses = train(toy, writing, 0, LAST, save_at=(SAVE_AT,))
        writing.wait()
        (saved,) = writing.poll()
    assert isinstance(saved, Saved)
    assert saved.version == SAVE_AT

    resumed = Toy(seed=99)
    loaded = load(Store(folder), resumed.state, seed=0)
    assert isinstance(loaded, Loaded)
    assert (loaded.version, loaded.progress, loaded.findings) == (SAVE_AT, {"step": SAVE_AT}, [])
    with saver(folder, resumed) as writing:
        return losses[SAVE_AT:], train(resumed, writing, SAVE_AT, LAST)


def test_one_rank_s_checkpoint_loads_on_two_and_theirs_on_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    toy = Toy()
    with saver(tmp_path, toy) as writing:
        train(toy, writing, 0, 2, save_at=(2,))
    expected = whole(toy)
    for found in ranks.run(_load_and_save, 2, tmp_path):
        same(found, expected)
    back = Toy(seed=7)
    loaded = load(Store(tmp_path), back.state, seed=0)
    assert isinstance(loaded, Loaded)
    assert loaded.version == 3
    assert loaded.manifest.about["ranks"] == 2
    same(whole(back), expected)


def _load_and_save(folder: Path) -> dict[str, torch.Tensor]:
    join()
    toy = Toy(seed=9)
    loaded = load(Store(folder), toy.state, seed=0)
    assert isinstance(loaded, Loaded)
    with saver(folder, toy) as writing:
        writing.finished_update(3, {"step": 3})
        writing.request()
    return whole(toy)


def test_the_model_can_be_read_without_torch_distributed_and_without_a_configuration(tmp_path: Path) -> None:
    toy = Toy()
    with saver(tmp_path, toy) as writing:
        train(toy, writing, 0, 2, save_at=(2,))
    entry = Store(tmp_path).latest()
    assert entry is not None
    config, model = load_model(entry)
    assert config.model == toy.model.args
    tokens = torch.randint(0, 40, (1, 8))
    assert torch.equal(model(tokens).out, toy.model(tokens).out)
