"""The trainer's promise, whole: real text in, a model out that another library generates text with.

The text is this project's own documentation (README.md and docs/*.md).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ltf.__main__ import main

from .runs import ROOT, Runs

LOSS = 2.8
"""Nats a byte that 150 steps of the tiny preset reach on two ranks (2.52 when this was written); it begins at
ln 272 = 5.6, and bytes by their frequency alone give about 3.3."""


@pytest.mark.timeout(300)
def test_the_tiny_preset_learns_real_text_on_two_ranks_and_transformers_generates_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [str(ROOT / "README.md"), *map(str, sorted((ROOT / "docs").glob("*.md")))]
    assert main(["data", "prepare", *texts, "-o", str(tmp_path / "docs")]) == 0
    settings = {
        "preset": "tiny",
        "run": {},
        "data": {"sources": [{"prefix": str(tmp_path / "docs")}]},
        # The tests' machine is busy with other tests.
        "noise": {"slow_factor": 1e6, "jitter_factor": 1e6},
    }
    runs = Runs(settings, tmp_path)
    told = runs.warm("run", 2)
    assert told.losses[1] == pytest.approx(math.log(272), abs=0.2)
    assert told.losses[150] < LOSS
    assert told.findings == []
    assert main(["export", str(told.folder), str(tmp_path / "exported")]) == 0
    text = generate(tmp_path / "exported", "The node ")
    assert text.startswith("The node ")
    assert len(text) >= 60
    # It has learned to write words: most are letters and spaces, and words have a usual length.
    assert sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text)
    assert 2 < len(text) / len(text.split()) < 12


def generate(folder: Path, prompt: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    asked = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    made = model.generate(**asked, max_new_tokens=80, do_sample=True, temperature=0.5)
    text: str = tokenizer.decode(made[0])
    return text
