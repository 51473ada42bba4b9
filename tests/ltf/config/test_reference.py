from __future__ import annotations

from ltf.config.reference import markdown


def test_the_reference_has_type_default_and_meaning_of_every_kind_of_setting() -> None:
    lines = markdown().splitlines()
    assert "| `run.steps` | a whole number, 1 or more | `1000` | Optimizer steps in all, " in "\n".join(lines)
    for setting in (
        "model.vocab_size",
        "model.moe",
        "model.moe.top_k",
        "model.init.router_std",
        "data.sources",
        "data.sources.N.prefix",
        "data.evaluation.sources.N.documents",
        "guard.spikes.loss_z",
        "output.peak_flops",
    ):
        row = [line for line in lines if line.startswith(f"| `{setting}` |")]
        assert len(row) == 1, setting
        assert all(cell.strip() for cell in row[0].strip("|").split(" | ")), row


def test_the_reference_writes_defaults_as_yaml_has_them() -> None:
    text = markdown()
    assert "| one of gaussian, scaled_output | `gaussian` |" in text
    assert "| `[0.9, 0.95]` |" in text
    assert "| true or false | `true` |" in text
    assert "| a whole number | required |" in text
