"""A small model, a small corpus, and runs of it in warm ranks or in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ltf.data.corpus import text
from ltf.data.prepare import Recipe, prepare

from .runs import Runs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix of token files: 200 kB of made-up English, as bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = (json.dumps({"text": document}) + "\n" for document in text(seed=1, size=200_000))
    (folder / "grammar.jsonl").write_text("".join(documents))
    prepare([folder / "grammar.jsonl"], folder / "grammar", Recipe())
    return folder / "grammar"


@pytest.fixture
def settings(corpus: Path) -> dict[str, Any]:
    """A mixture of experts that takes milliseconds a step; 8 samples a step in micro-batches of 2."""
    return {
        "run": {"steps": 12, "seed": 3, "device": "cpu"},
        "model": {
            "vocab_size": 272, "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
            "max_positions": 64,
            "moe": {"experts": 8, "top_k": 2, "expert_width": 32, "z_coefficient": 1e-3},
        },
        "data": {"sources": [{"prefix": str(corpus), "documents": [0, 0.9]}], "seq_len": 32, "pad": 257},
        "batch": {"samples": 8, "micro": 2},
        "optimizer": {"lr": 3e-3, "warmup_steps": 4},
        "checkpoint": {"every_steps": 4},
        "guard": {"corruption": {"every_steps": None}},
        # The tests' machine is busy with other tests.
        "noise": {"slow_factor": 1e6, "jitter_factor": 1e6},
        "output": {"heartbeat_seconds": 1.0},
    }  # fmt: skip


@pytest.fixture
def evaluation(corpus: Path) -> dict[str, Any]:
    """On what the settings do not train on."""
    sources = [{"prefix": str(corpus), "documents": [0.9, 1]}]
    return {"sources": sources, "every_steps": 4, "batches": 2}


@pytest.fixture
def runs(settings: dict[str, Any], tmp_path: Path) -> Runs:
    return Runs(settings, tmp_path)
