from __future__ import annotations

from typing import Any

import pytest

from ltf.config.agreement import check, check_data, check_world, disagreements, stages_per_rank
from ltf.config.errors import ConfigError
from ltf.config.schema import Config

DENSE = {
    "vocab_size": 64,
    "layers": 4,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn_width": 48,
    "max_positions": 4096,
}
MOE = DENSE | {"moe": {"experts": 8, "top_k": 2, "expert_width": 16}}


def config(model: dict[str, Any] = DENSE, **sections: Any) -> Config:
    return Config.model_validate({"model": model, **sections})


def only(found: Config) -> str:
    """The one mistake, as a person reads it."""
    mistakes = disagreements(found)
    assert len(mistakes) == 1, mistakes
    with pytest.raises(ConfigError):
        check(found)
    return str(mistakes[0])


@pytest.mark.parametrize(
    ("model", "sections", "says"),
    [
        (DENSE, {"parallel": {"pipeline": 5}}, "parallel.pipeline: found 5, expected at most 4 stages"),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 3}},
            "parallel.stages_per_rank: found 3, expected at most 4 stages, one for each of model.layers; "
            "2 pipeline x 3 stages_per_rank = 6",
        ),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 1}},
            "parallel.stages_per_rank: found 1, expected 2 or more for the schedule interleaved",
        ),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "interleaved"}, "balance": {"mode": "auto"}},
            "balance.mode: found auto, expected static with the schedule interleaved",
        ),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "stages_per_rank": 2}},
            "parallel.stages_per_rank: found 2, expected 1 for the schedule 1f1b",
        ),
        (DENSE, {"parallel": {"stages_per_rank": 2}}, "parallel.stages_per_rank: found 2, expected 1 where"),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "zero_bubble", "recompute": "block"}},
            "parallel.recompute: found block, expected none with the schedule zero_bubble",
        ),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "zero_bubble", "compile": True}},
            "parallel.compile: found true, expected false with the schedule zero_bubble",
        ),
        (
            DENSE,
            {"precision": {"attention_kernel": "cudnn"}},
            "precision.attention_kernel: found cudnn, expected another kernel where run.deterministic",
        ),
        (
            DENSE | {"tied_embeddings": True},
            {"parallel": {"pipeline": 2}},
            "model.tied_embeddings: found true, expected false where parallel.pipeline is 2",
        ),
        (
            DENSE,
            {"parallel": {"expert": 2}},
            "parallel.expert: found 2, expected 1 for a model without experts",
        ),
        (
            MOE,
            {"parallel": {"expert": 3}},
            "parallel.expert: found 3, expected a divisor of 8 (model.moe.experts); "
            "8 = 2 x 3 + 2; one of 1, 2, 4, 8",
        ),
        (
            MOE,
            {"parallel": {"expert": 4, "shard": 6}},
            "parallel.expert: found 4, expected a divisor of 6 (parallel.shard)",
        ),
        (
            DENSE,
            {"batch": {"samples": 10, "micro": 4}},
            "batch.samples: found 10, expected a multiple of 4 (batch.micro); "
            "10 / 4 is not whole; give 8 or 12",
        ),
        (
            DENSE,
            {"data": {"seq_len": 4097}},
            "data.seq_len: found 4097, expected at most 4096 (model.max_positions)",
        ),
        (DENSE, {"data": {"packing": "best_fit", "pad": 64}}, "data.pad: found 64, expected less than 64"),
        (
            DENSE,
            {"data": {"sources": [{"prefix": "a"}, {"prefix": "b", "documents": [0.5, 0.5]}]}},
            "data.sources.1.documents: found [0.5, 0.5], expected a beginning before its end",
        ),
        (
            DENSE,
            {
                "data": {
                    "sources": [{"prefix": "a", "documents": [0, 0.99]}],
                    "evaluation": {"sources": [{"prefix": "./a", "documents": [0.9, 1]}]},
                }
            },
            "data.evaluation.sources.0.documents: found 0.9 to 1, "
            "expected documents that data.sources (0 to 0.99",
        ),
        (
            DENSE,
            {"run": {"steps": 50}},
            "optimizer.warmup_steps: found 100, expected at most 50 (run.steps)",
        ),
        (
            DENSE,
            {"run": {"steps": 150}, "optimizer": {"decay_steps": 60}},
            "optimizer.decay_steps: found 60, expected at most 50; warmup_steps 100 + decay_steps 60 = 160",
        ),
        (
            DENSE,
            {"guard": {"spikes": {"window": 16, "warmup": 17}}},
            "guard.spikes.warmup: found 17, expected at most 16 (guard.spikes.window)",
        ),
        (
            DENSE,
            {"checkpoint": {"every_steps": 30, "keep_every": 100}},
            "checkpoint.keep_every: found 100, expected a multiple of 30 (checkpoint.every_steps)",
        ),
        (
            DENSE,
            {"checkpoint": {"every_steps": None}, "guard": {"spikes": {"answer": "roll_back"}}},
            "guard.spikes.answer: found roll_back, expected another answer where no checkpoints are made",
        ),
    ],
)
def test_what_disagrees_is_named_with_the_fix(
    model: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    assert only(config(model, **sections)).startswith(says)


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        (DENSE, {}),
        (DENSE, {"parallel": {"pipeline": 4}}),
        (DENSE, {"parallel": {"pipeline": 2, "schedule": "interleaved"}}),
        (DENSE, {"parallel": {"schedule": "interleaved"}}),
        (
            DENSE,
            {"parallel": {"pipeline": 2, "schedule": "interleaved", "recompute": "block", "compile": True}},
        ),
        (DENSE | {"tied_embeddings": True}, {}),
        (MOE, {"parallel": {"expert": 4, "shard": 8}}),
        (DENSE, {"data": {"seq_len": 4096, "pad": 64}}),
        (DENSE, {"data": {"packing": "best_fit", "pad": 63}}),
        (
            DENSE,
            {
                "data": {
                    "sources": [{"prefix": "a", "documents": [0, 0.99]}],
                    "evaluation": {"sources": [{"prefix": "a", "documents": [0.99, 1]}, {"prefix": "b"}]},
                }
            },
        ),
        (DENSE, {"run": {"steps": 100}}),
        (DENSE, {"run": {"steps": 160}, "optimizer": {"decay_steps": 60}}),
        (DENSE, {"checkpoint": {"every_steps": 30, "keep_every": 90}}),
        (
            DENSE,
            {
                "checkpoint": {"every_steps": None, "every_minutes": 1},
                "guard": {"spikes": {"answer": "roll_back"}},
            },
        ),
        (DENSE, {"guard": {"spikes": {"enabled": False, "window": 8}}}),
    ],
)
def test_what_agrees_is_let_through(model: dict[str, Any], sections: dict[str, Any]) -> None:
    check(config(model, **sections))


def test_training_needs_data() -> None:
    check_data(config(data={"sources": [{"prefix": "a"}]}))
    with pytest.raises(ConfigError, match=r"data.sources: found no source.*--set data.sources.0.prefix="):
        check_data(config())


def test_stages_a_rank_follow_the_schedule() -> None:
    assert stages_per_rank(config(parallel={"pipeline": 2})) == 1
    assert stages_per_rank(config(parallel={"pipeline": 2, "schedule": "zero_bubble"})) == 2
    assert stages_per_rank(config(parallel={"schedule": "zero_bubble"})) == 1
    assert (
        stages_per_rank(config(parallel={"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 3}))
        == 3
    )


@pytest.mark.parametrize(
    ("sections", "world", "says"),
    [
        (
            {"parallel": {"shard": 2}},
            3,
            "parallel: found degrees that do not fit (pipeline 1 x replicate 1 x shard 2 = 2",
        ),
        (
            {"batch": {"samples": 12, "micro": 2}},
            4,
            "batch.samples: found 12, expected a multiple of 8 = 2 (batch.micro) x 4 data ranks; "
            "12 / 8 is not whole; give 16",
        ),
        (
            {"batch": {"samples": 2, "micro": 1}, "parallel": {"pipeline": 4}},
            4,
            "batch.samples: found 2, which is 2 micro-batches a data rank",
        ),
        (
            {"batch": {"samples": 5}, "parallel": {"pipeline": 2, "schedule": "interleaved"}},
            2,
            "batch.samples: found 5, which is 5 micro-batches a data rank, "
            "expected what the schedule interleaved",
        ),
        (
            {"batch": {"samples": 6, "micro": 2}, "balance": {"mode": "auto"}},
            4,
            "batch.samples: found 6, expected a multiple of 2 = 2 (batch.micro) x 1 (parallel.expert), "
            "and at least 8",
        ),
        (
            {"batch": {"samples": 10, "micro": 1}, "balance": {"mode": "auto"}, "parallel": {"expert": 4}},
            8,
            "batch.samples: found 10, expected a multiple of 4 = 1 (batch.micro) x 4 (parallel.expert)",
        ),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_told_with_the_arithmetic(
    sections: dict[str, Any], world: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(config(MOE, **sections), world)
    assert str(caught.value).startswith(says)


def test_a_number_of_ranks_that_fits_gives_the_layout() -> None:
    layout = check_world(config(MOE, batch={"samples": 16}, parallel={"pipeline": 2, "expert": 2}), 8)
    assert (layout.pipeline, layout.shard, layout.expert, layout.data_ranks) == (2, 4, 2, 4)
    # Shares need not be equal where slow ranks take less.
    assert check_world(config(batch={"samples": 10}, balance={"mode": "auto"}), 4).data_ranks == 4
