"""A checkpoint of one layout loads in another: expert parallel, pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ltf.checkpoint.load import Loaded, load
from ltf.checkpoint.saver import Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Config
from ltf.model.args import Stage
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from ltf.model.moe import MoE
from ltf.optim import adamw
from ltf.parallel.shard import build
from ltf.parallel.world import join as join_world
from tests.ltf import ranks
from tests.ltf.checkpoint.toy import ARGS, CONFIG, Toy, join, same, settings, whole


def test_four_ranks_with_experts_divided_load_on_two_and_on_one(tmp_path: Path) -> None:
    ranks.run(_save_expert_parallel, 4, tmp_path)
    expected = _after_a_step_of_ones(Toy())
    for found in ranks.run(_load_on_two, 2, tmp_path):
        same(found, expected)
    alone = Toy(seed=3)
    assert isinstance(load(Store(tmp_path), alone.state, seed=0), Loaded)
    same(whole(alone), expected)


def test_one_rank_loads_on_four_with_experts_divided(tmp_path: Path) -> None:
    toy = Toy()
    expected = _after_a_step_of_ones(toy)
    _save(tmp_path, toy.state)
    for found in ranks.run(_load_expert_parallel, 4, tmp_path):
        same(found, expected)


def test_two_pipeline_stages_load_on_one_rank_and_one_rank_on_two_stages(tmp_path: Path) -> None:
    ranks.run(_save_stage, 2, tmp_path / "stages")
    expected = _after_a_step_of_ones(Toy())
    alone = Toy(seed=3)
    assert isinstance(load(Store(tmp_path / "stages"), alone.state, seed=0), Loaded)
    same(whole(alone), expected)

    _save(tmp_path / "whole", alone.state)
    first, second = ranks.run(_load_stage, 2, tmp_path / "whole")
    same(first | second, expected)
    assert not first.keys() & second.keys()


class ExpertParallel(Toy):
    """Two expert groups of two ranks, the rest of each layer sharded over all four."""

    def __init__(self, seed: int) -> None:
        self.model = Decoder(ARGS)
        init_weights(self.model, seed)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
        every = mesh._flatten("all")
        for _, block in self.model.blocks():
            assert isinstance(block.ffn, MoE)
            experts = block.ffn.experts
            for name, parameter in list(experts.named_parameters()):
                cut = distribute_tensor(parameter.detach(), mesh["ep"], [Shard(0)])
                experts.register_parameter(name, nn.Parameter(cut))
            fully_shard(experts, mesh=mesh["efsdp"])
            fully_shard(block, mesh=every)
        fully_shard(self.model, mesh=every)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = State([self.model], [self.optimizer])


def _save_expert_parallel(folder: Path) -> None:
    join()
    toy = ExpertParallel(seed=1)
    _step_of_ones(toy)
    _save(folder, toy.state)


def _load_expert_parallel(folder: Path) -> dict[str, torch.Tensor]:
    join()
    toy = ExpertParallel(seed=2)
    assert isinstance(load(Store(folder), toy.state, seed=0), Loaded)
    return whole(toy)


def _load_on_two(folder: Path) -> dict[str, torch.Tensor]:
    join()
    toy = Toy(seed=2)
    assert isinstance(load(Store(folder), toy.state, seed=0), Loaded)
    return whole(toy)


def _stage(seed: int) -> Toy:
    rank = dist.get_rank()
    return Toy(seed=seed, stage=Stage((rank,), embed=rank == 0, head=rank == 1), shard=False)


def _save_stage(folder: Path) -> None:
    join()
    toy = _stage(1)
    _step_of_ones(toy)
    _save(folder, toy.state)


def _load_stage(folder: Path) -> dict[str, torch.Tensor]:
    join()
    toy = _stage(2)
    assert isinstance(load(Store(folder), toy.state, seed=0), Loaded)
    return whole(toy)


def _save(folder: Path, state: State) -> None:
    with Saver(Store(folder), state, settings(), config=CONFIG, signals=False) as saver:
        saver.finished_update(1, {})
        saver.request()


def _step_of_ones(toy: Toy) -> None:
    for parameter in toy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    toy.update()


def _after_a_step_of_ones(toy: Toy) -> dict[str, torch.Tensor]:
    _step_of_ones(toy)
    return whole(toy)


def test_what_the_trainer_builds_loads_in_its_other_layouts(tmp_path: Path) -> None:
    four, two = tmp_path / "four", tmp_path / "two"
    ranks.run(_trained_by, 4, {"expert": 2}, None, four, timeout=110)
    ranks.run(_trained_by, 2, {"replicate": 2}, four, two)
    (first,) = ranks.run(_trained_by, 1, {}, four, None)
    (second,) = ranks.run(_trained_by, 1, {}, two, None)
    assert any(name.endswith("/exp_avg") for name in first)
    same(second, first)


def _trained_by(
    parallel: dict[str, int], source: Path | None, target: Path | None
) -> dict[str, torch.Tensor] | None:
    """Load, or make a step of ones; save, or return everything."""
    config = Config.model_validate({"model": CONFIG["model"], "parallel": parallel})
    world = join_world(config.parallel, "cpu")
    try:
        toy = Toy.__new__(Toy)
        toy.model = build(ARGS, Stage.whole(ARGS), world, config)
        toy.optimizer = adamw(toy.model.named_parameters(), config.optimizer)
        toy.state = State([toy.model], [toy.optimizer])
        if source is None:
            _step_of_ones(toy)
        else:
            assert isinstance(load(Store(source), toy.state, seed=0), Loaded)
        if target is None:
            return whole(toy)
        _save(target, toy.state)
        return None
    finally:
        world.close()
