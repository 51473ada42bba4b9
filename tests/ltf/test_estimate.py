from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ltf import estimate
from ltf.config.errors import ConfigError
from ltf.config.read import presets, read
from ltf.config.schema import Config, PipelineSchedule
from ltf.estimate import smallest_world
from ltf.memory import chunks_in_flight, layer_activations, logits, of_rank
from ltf.model.args import ModelArgs, MoEArgs, Stage
from ltf.model.count import count_parameters
from ltf.model.decoder import Decoder
from ltf.model.init import init_weights
from ltf.parallel.layout import Layout
from ltf.passes import cross_entropy_sum

DENSE = ModelArgs(vocab_size=256, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn_width=160)
MOE = replace(DENSE, ffn_width=None, moe=MoEArgs(experts=8, top_k=2, expert_width=48))
SHAPES = {
    "dense": DENSE,
    "dense, without qk norm": replace(DENSE, qk_norm=False),
    "experts": MOE,
    "a shared expert, top-3": replace(
        MOE, moe=MoEArgs(experts=8, top_k=3, expert_width=32, shared_experts=2)
    ),
    "a dense layer, then experts": replace(
        DENSE, moe=MoEArgs(experts=4, top_k=2, expert_width=48, dense_layers=1)
    ),
}


def config(args: ModelArgs = DENSE, **sections: Any) -> Config:
    return Config.model_validate({"model": args, "data": {"seq_len": 64}, **sections})


def alone(found: Config) -> Any:
    """A single rank's memory."""
    return of_rank(found, Layout(), 0, (Stage.whole(found.model),))


class Saved:
    """Bytes of what autograd keeps, each storage once, parameters not."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)
        return tensor

    def measure(self, run: Any) -> int:
        with saved_tensors_hooks(self.pack, lambda tensor: tensor):
            self.alive.append(run())
        return sum(self.sizes.values())


@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_the_model_keeps_for_its_backward_pass(name: str) -> None:
    """Within 1 %: the tables of the rotary embedding, held once for all layers, are left out."""
    args = SHAPES[name]
    found = config(args, batch={"samples": 2, "micro": 2})
    model = Decoder(args)
    init_weights(model, 0)
    tokens = torch.randint(0, args.vocab_size, (2, 64))
    measured = Saved(model).measure(lambda: model(tokens).out)
    assert alone(found).activations == pytest.approx(measured, rel=0.01)


def test_each_layers_share_of_the_activations_is_measured_too() -> None:
    """The difference between two depths, which leaves embedding and head out; to a few bytes an expert."""
    tokens = torch.randint(0, 256, (2, 64))
    measured = []
    for layers in (1, 2):
        model = Decoder(replace(MOE, layers=layers))
        init_weights(model, 0)
        measured.append(Saved(model).measure(lambda model=model: model(tokens).out))
    assert layer_activations(MOE, 0, 128, 4) == pytest.approx(measured[1] - measured[0], rel=2e-4)


def test_the_memory_of_the_loss_is_the_logits_their_log_probabilities_and_a_gradient() -> None:
    args, model = DENSE, Decoder(DENSE)
    init_weights(model, 0)
    tokens = torch.randint(0, args.vocab_size, (2, 64))
    hidden = model(tokens).out.detach().requires_grad_()
    kept = Saved(model).measure(lambda: cross_entropy_sum(hidden, tokens, torch.ones_like(tokens)))
    table = 2 * 64 * args.vocab_size * 4
    # The log-probabilities are what the loss keeps; the logits and the gradient are alive beside them.
    assert kept == pytest.approx(table, rel=0.02)
    assert logits(args, 128) == 3 * table


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_gradients_and_moments_are_those_of_a_real_model(name: str) -> None:
    args = SHAPES[name]
    model = Decoder(args)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(0, 256, (1, 8))).out.sum().backward()
    optimizer.step()
    memory = alone(config(args))
    assert memory.parameters == sum(p.nbytes for p in model.parameters())
    # An expert that no token chose has no gradient of its own, the stack of experts has one whole.
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    assert memory.gathered == memory.unreduced == 0


def test_when_parameters_are_gathered_is_as_the_sharding_decides() -> None:
    from ltf.memory import gathers_once
    from ltf.parallel import shard

    for sections in (
        {},
        {"parallel": {"reshard": False}},
        {"parallel": {"pipeline": 2}},
        {"balance": {"mode": "auto"}},
    ):
        assert gathers_once(config(**sections)) == shard.gathers_once(config(**sections))


def test_gradients_wait_for_the_last_micro_batch_where_parameters_stay_gathered() -> None:
    whole, two = (Stage.whole(DENSE),), Layout(shard=2)
    kept: dict[str, Any] = {"parallel": {"reshard": False}}
    one_pass, several = (of_rank(config(batch={"samples": n}, **kept), two, 0, whole) for n in (2, 8))
    assert several.unreduced - one_pass.unreduced == 4 * count_parameters(DENSE).total
    freed = of_rank(config(batch={"samples": 8}), two, 0, whole)
    assert freed.unreduced == one_pass.unreduced


def test_the_parts_of_a_model_add_up_to_the_whole() -> None:
    tied = replace(DENSE, tied_embeddings=True)
    for args in (*SHAPES.values(), tied):
        assert alone(config(args)).parameters == 4 * count_parameters(args).total


def test_shards_divide_what_is_kept_and_not_what_is_gathered() -> None:
    found = config(MOE, batch={"samples": 16}, precision={"compute": "bf16"})
    whole = (Stage.whole(MOE),)
    two, four = (of_rank(found, Layout(shard=n), 0, whole) for n in (2, 4))
    assert two.parameters == 2 * four.parameters
    assert two.optimizer == 2 * four.optimizer
    assert two.gathered == four.gathered == 2 * count_parameters(MOE).total
    assert two.activations == four.activations


def test_expert_parallel_ranks_gather_their_own_experts_alone() -> None:
    found = config(MOE, batch={"samples": 16}, precision={"compute": "bf16"})
    whole = (Stage.whole(MOE),)
    flat, divided = (of_rank(found, Layout(shard=4, expert=n), 0, whole) for n in (1, 4))
    assert flat.parameters == divided.parameters
    assert flat.gathered - divided.gathered == 2 * count_parameters(MOE).experts * 3 // 4


def test_gathered_layers_are_two_where_they_are_freed_again() -> None:
    deep = replace(DENSE, layers=8)
    whole = (Stage.whole(deep),)
    freed, kept = (
        of_rank(config(deep, parallel={"reshard": r}), Layout(shard=2), 0, whole).gathered
        for r in (True, False)
    )
    layer = 4 * (count_parameters(deep).total - count_parameters(replace(deep, layers=7)).total)
    assert kept - freed == 6 * layer


def test_recomputation_keeps_one_input_a_layer_and_one_layer_whole() -> None:
    deep = replace(DENSE, layers=8)
    none, block = (alone(config(deep, parallel={"recompute": r})).activations for r in ("none", "block"))
    layer, one_input = layer_activations(deep, 0, 64, 4), 64 * deep.width * 4
    assert none - block == 7 * layer - 8 * one_input


def test_recomputation_is_what_is_measured_with_it() -> None:
    """Inputs of layers and the ends; the layer that is computed again is not part of what waits."""
    from torch.utils.checkpoint import checkpoint

    args = replace(DENSE, layers=4)
    model = Decoder(args)
    init_weights(model, 0)
    for block in model.layers.values():
        plain = block.forward
        block.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
    tokens = torch.randint(0, args.vocab_size, (2, 64))
    measured = Saved(model).measure(lambda: model(tokens).out)
    found = alone(config(args, batch={"samples": 2, "micro": 2}, parallel={"recompute": "block"}))
    assert found.activations - layer_activations(args, 0, 128, 4) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("schedule", "per_rank", "passes", "expected"),
    [
        (PipelineSchedule.ONE_F_ONE_B, 1, 8, [4, 3, 2, 1]),
        (PipelineSchedule.ONE_F_ONE_B, 1, 2, [2, 2, 2, 1]),
        (PipelineSchedule.INTERLEAVED, 2, 8, [11, 9, 7, 5]),
        (PipelineSchedule.INTERLEAVED, 2, 4, [8, 8, 7, 5]),
        (PipelineSchedule.ZERO_BUBBLE, 2, 8, [8, 8, 8, 8]),
    ],
)
def test_micro_batches_under_way_follow_the_schedule(
    schedule: PipelineSchedule, per_rank: int, passes: int, expected: list[int]
) -> None:
    layout = Layout(pipeline=4)
    assert [chunks_in_flight(layout, rank, per_rank, schedule, passes) for rank in range(4)] == expected


def test_pipeline_ranks_hold_the_whole_model_between_them() -> None:
    args = replace(DENSE, layers=8)
    found = estimate.estimate(config(args, parallel={"pipeline": 4}, batch={"samples": 8}))
    assert sum(one.parameters for one in found.memory) == 4 * count_parameters(args).total
    assert [one.logits > 0 for one in found.memory] == [False, False, False, True]
    assert found.memory[found.largest].total == max(one.total for one in found.memory)


def test_an_estimate_has_operations_tokens_and_a_checkpoints_size() -> None:
    found = estimate.estimate(read("qwen3-30b-a3b"), world=64)
    assert found.tokens_a_step == 1024 * 4096
    assert found.micro_batches == 16
    assert found.checkpoint_bytes == 12 * found.parameters.total
    # 6 operations a parameter and token, the rule of thumb, plus attention.
    matrices = found.parameters.active - found.parameters.embedding - found.parameters.norms
    assert found.full.training > found.causal.training > 6 * matrices


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="parallel"):
        estimate.estimate(config(parallel={"pipeline": 2}), world=3)


@pytest.mark.parametrize("name", presets())
def test_the_smallest_world_is_one_that_fits(name: str) -> None:
    found = estimate.estimate(read(name))
    assert found.world == smallest_world(read(name)) == found.layout.world


def test_200b_parameters_are_estimated_in_seconds_without_torch() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "ltf",
            "estimate",
            "sigma-200b-a20b",
            "--world",
            "2048",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert time.monotonic() - start < 10
    found = json.loads(done.stdout)
    assert found["schema"] == "ltf/estimate/1"
    assert found["parameters"]["total"] == pytest.approx(200e9, rel=0.02)
    assert found["memory"]["largest"]["total"] < 64 * 2**30
    assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


def test_people_get_an_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main(["qwen3-30b-a3b", "--world", "64", "--set", "batch.samples=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "64 ranks: pipeline 1 x replicate 1 x shard 64, expert 8"
    assert any(line.split() == ["total", "30.53", "B"] for line in lines)
    assert any(line.split() == ["tokens", "262,144"] for line in lines)
    ends = {len(line) for line in lines if line.startswith("  ")}
    assert len(ends) == 1, "figures end in one column"
