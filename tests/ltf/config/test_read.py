from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ltf.config.errors import ConfigError
from ltf.config.fields import Setting, settings
from ltf.config.read import presets, read
from ltf.config.schema import Answer, Config, PipelineSchedule

MODEL = "model: {vocab_size: 64, layers: 2, width: 32, heads: 4, kv_heads: 2, head_dim: 8, ffn_width: 48}\n"


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def mistakes(folder: Path, text: str, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of the error, the folder's name taken away."""
    with pytest.raises(ConfigError) as caught:
        read(written(folder, text), overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.mistakes), "one line a mistake"
    return [line.replace(f"{folder}/", "") for line in lines]


def test_a_file_is_read_with_the_defaults_of_what_it_leaves_out(tmp_path: Path) -> None:
    config = read(
        written(tmp_path, MODEL + "run: {steps: 7}\noptimizer: {betas: [0.8, 0.9], warmup_steps: 0}\n")
    )
    assert (config.model.layers, config.run.steps, config.run.seed) == (2, 7, 0)
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "1", "1e0"])
def test_a_number_may_be_written_in_any_usual_way(tmp_path: Path, text: str) -> None:
    config = read(written(tmp_path, MODEL + f"optimizer: {{lr: {text}}}\n"), [f"optimizer.eps={text}"])
    assert config.optimizer.lr == config.optimizer.eps == float(text)


def test_unknown_keys_are_all_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    text = MODEL.replace("layers", "layrs") + "run:\n  stepps: 3\nguard:\n  spikes:\n    windw: 9\nlr: 1\n"
    text += "data:\n  sources:\n  - prefx: x\n"
    found = mistakes(tmp_path, text)
    assert [line.partition(" found ")[0] for line in found] == [
        "run.yaml:1: model.layrs:",
        "run.yaml:3: run.stepps:",
        "run.yaml:6: guard.spikes.windw:",
        "run.yaml:7: lr:",
        "run.yaml:10: data.sources.0.prefx:",
    ]
    for line, near in zip(found, ("'layers'", "'steps'", "'window'", "optimizer", "'prefix'"), strict=True):
        assert near in line.rpartition(";")[2]


def test_unknown_keys_in_the_dataclasses_of_the_model_are_refused_too(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "preset: tiny\nmodel:\n  moe: {topk: 1}\n  init: {sdt: 0.1}\n")
    assert found[0].startswith("run.yaml:3: model.moe.topk: found an unknown key")
    assert found[0].endswith("did you mean 'top_k'?")
    assert found[1].endswith("did you mean 'std'?")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "run: {steps: many}",
            "run.steps: found the text 'many', expected a whole number, 1 or more; correct",
        ),
        (
            "run: {steps: '4'}",
            "run.steps: found the text '4', expected a whole number, 1 or more; take away the",
        ),
        ("run: {steps: 1e3}", "run.steps: found 1000.0, expected a whole number, 1 or more; write 1000"),
        ("run: {steps: 0}", "run.steps: found 0, expected a whole number, 1 or more"),
        ("run: {steps: true}", "run.steps: found true, expected a whole number"),
        ("run: {steps: [1]}", "run.steps: found a list, expected"),
        (
            "run: {deterministic: no}",
            "run.deterministic: found the text 'no', expected true or false; write false",
        ),
        ("run: 4", "run: found 4, expected a section"),
        (
            "optimizer: {betas: [0.9]}",
            "optimizer.betas: found a list of 1, expected a list of 2, each a number fro",
        ),
        ("optimizer: {betas: [0.9, 2]}", "optimizer.betas.1: found 2, expected a number from 0 to 1"),
        ("optimizer: {lr: .nan}", "optimizer.lr: found nan, expected a number above 0"),
        (
            "parallel: {shard: most}",
            "parallel.shard: found the text 'most', expected a whole number, 1 or more, or",
        ),
        (
            "parallel: {schedule: interleavd}",
            "parallel.schedule: found the text 'interleavd', expected one of 1f1b",
        ),
        (
            "data: {sources: [{weight: 1}]}",
            "data.sources.0.prefix: found nothing, expected a path; add `prefix`",
        ),
    ],
)
def test_a_wrong_value_is_told_with_line_field_and_fix(tmp_path: Path, text: str, says: str) -> None:
    assert mistakes(tmp_path, MODEL + text + "\n")[0].startswith(f"run.yaml:2: {says}")


def test_a_nearly_right_choice_gets_the_right_one_as_advice(tmp_path: Path) -> None:
    found = mistakes(tmp_path, MODEL + "guard: {spikes: {answer: rollback}}\n")
    assert found[0].endswith("; did you mean 'roll_back'?")


def test_a_shape_that_cannot_be_is_told_at_the_line_of_its_field(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "preset: tiny\nmodel:\n  layers: 2\n  moe:\n    top_k: 9\n")
    assert found == [
        "run.yaml:5: model.moe.top_k: found 9, expected numbers from 1 to 8 (moe.experts); "
        "choose fewer experts a token or more experts"
    ]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = MODEL.replace("layers: 2", "layers: two") + "run:\n  steps: 0\n  seed: -1\n"
    assert [line.split(":")[1] for line in mistakes(tmp_path, text)] == ["3", "4", "1"]


def test_a_file_without_a_model_is_told_to_begin_with_a_preset(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "run: {steps: 1}\n")[0].endswith("or begin with `preset: tiny`")


def test_a_file_is_laid_over_its_preset_key_by_key(tmp_path: Path) -> None:
    config = read(written(tmp_path, "preset: tiny\nmodel:\n  moe:\n    experts: 4\n  layers: 3\n"))
    below = read("tiny")
    assert config.model.moe is not None
    assert below.model.moe is not None
    assert config.model.moe == dataclasses.replace(below.model.moe, experts=4)
    assert config.model.width == below.model.width
    assert config.optimizer == below.optimizer


def test_nothing_takes_a_section_of_the_preset_away(tmp_path: Path) -> None:
    config = read(written(tmp_path, "preset: tiny\nmodel: {moe: null, ffn_width: 96}\n"))
    assert config.model.moe is None


def test_presets_may_be_files_that_rest_on_others(tmp_path: Path) -> None:
    written(tmp_path, "preset: tiny\nrun: {steps: 30, seed: 1}\n", "base/team.yaml")
    written(tmp_path, "preset: ./team.yaml\nrun: {seed: 2}\n", "base/mine.yaml")
    config = read(written(tmp_path, "preset: base/mine.yaml\nrun: {name: x}\n"))
    assert (config.run.steps, config.run.seed, config.run.name) == (30, 2, "x")


def test_a_mistake_in_a_preset_is_told_with_the_presets_file(tmp_path: Path) -> None:
    written(tmp_path, "preset: tiny\nrun: {steps: no}\n", "base.yaml")
    assert mistakes(tmp_path, "preset: ./base.yaml\n")[0].startswith("base.yaml:2: run.steps: found")


def test_presets_that_rest_on_each_other_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "preset: ./run.yaml\n", "other.yaml")
    assert mistakes(tmp_path, "preset: ./other.yaml\n")[0].startswith(
        "other.yaml:1: preset: found ./run.yaml"
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [("tinny", "did you mean 'tiny'?"), ("./none.yaml", "correct the path"), ("4", "name one")],
)
def test_a_preset_that_is_not_there_is_refused(tmp_path: Path, asked: str, says: str) -> None:
    found = mistakes(tmp_path, f"\npreset: {asked}\n")
    assert found[0].startswith("run.yaml:2: preset: found")
    assert found[0].endswith(says)


def test_a_preset_can_be_read_by_name_and_a_misspelt_one_is_refused() -> None:
    assert read("tiny").run.name == "tiny"
    with pytest.raises(ConfigError, match=r"qwen3-30b: found no such file.*did you mean 'qwen3-30b-a3b'\?"):
        read("qwen3-30b")


def test_a_folder_that_has_a_presets_name_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert read("tiny").run.name == "tiny"


def test_overrides_come_last_in_order(tmp_path: Path) -> None:
    overrides = [
        "run.steps=40",
        "run.steps=50",
        "model.moe.top_k=[1, 2, 1, 2]",
        "model.moe.renormalise=false",
    ]
    config = read(
        written(tmp_path, "preset: tiny\nrun: {steps: 30}\n"), [*overrides, "guard.spikes.answer=skip"]
    )
    assert config.run.steps == 50
    assert config.model.top_k(1) == 2
    assert config.guard.spikes.answer is Answer.SKIP


def test_overrides_reach_and_lengthen_lists(tmp_path: Path) -> None:
    text = MODEL + "data:\n  sources:\n  - {prefix: /a, weight: 1}\n"
    config = read(written(tmp_path, text), ["data.sources.0.weight=2", "data.sources.1.prefix=/b"])
    assert [(str(s.prefix), s.weight) for s in config.data.sources] == [("/a", 2.0), ("/b", None)]
    added = read(written(tmp_path, MODEL), ["data.sources.0.prefix=/c", "data.sources.1={prefix: /d}"])
    assert [str(source.prefix) for source in added.data.sources] == ["/c", "/d"]


def test_an_override_may_be_a_section_that_is_merged(tmp_path: Path) -> None:
    config = read(written(tmp_path, "preset: tiny\n"), ["model.moe={experts: 4}", "parallel={shard: 2}"])
    assert config.model.moe is not None
    assert (config.model.moe.experts, config.model.moe.top_k, config.parallel.shard) == (4, 2, 2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.layers=x",
            "--set model.layers=x: model.layers: found the text 'x', expected a whole number; cor",
        ),
        ("model.layerz=4", "--set model.layerz=4: model.layerz: found an unknown key"),
        ("modl.layers=4", "--set modl.layers=4: modl: found an unknown key"),
        ("model.layers", "--set model.layers: found 'model.layers', expected KEY=VALUE"),
        ("model..layers=1", "--set model..layers=1: found 'model..layers=1', expected KEY=VALUE"),
        (
            "model.layers.x=4",
            "--set model.layers.x=4: model.layers: found 2, expected a section with a key 'x'",
        ),
        ("run.steps=[", "--set run.steps=[: found a slip of syntax"),
        ("data.sources.1.weight=2", "--set data.sources.1.weight=2: data.sources"),
        ("preset=tiny", "--set preset=tiny: preset: found a preset in an override"),
    ],
)
def test_a_wrong_override_is_named_in_place_of_file_and_line(
    tmp_path: Path, override: str, says: str
) -> None:
    text = MODEL + "data: {sources: []}\n"
    assert mistakes(tmp_path, text, [override])[0].startswith(says)


def test_a_mistake_that_an_override_left_alone_keeps_its_line(tmp_path: Path) -> None:
    text = MODEL + "data:\n  sources:\n  - {prefix: /a}\n  - {prefix: /b, weight: x}\n"
    found = mistakes(tmp_path, text, ["data.sources.0.weight=2", "run.steps=200"])
    assert found[0].startswith("run.yaml:5: data.sources.1.weight: found the text 'x'")


def test_what_sections_disagree_on_is_told_at_its_line(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "preset: tiny\nbatch:\n  samples: 7\n", ["batch.micro=2"])
    assert found[0].startswith("run.yaml:3: batch.samples: found 7, expected a multiple of 2 (batch.micro)")


def test_read_paths_are_relative_to_their_file_and_written_ones_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    base = "run: {initial_weights: weights}\ndata: {sources: [{prefix: ../corpus/a}, {prefix: /abs}]}\n"
    written(tmp_path, MODEL + base, "base/base.yaml")
    text = "preset: base/base.yaml\nrun: {output: out}\ncheckpoint: {directory: ~/saved}\n"
    text += "data: {evaluation: {sources: [{prefix: ~/held}]}}\n"
    config = read(written(tmp_path, text), ["data.sources.2.prefix=here"])
    assert config.run.initial_weights == tmp_path / "base" / "weights"
    assert [source.prefix for source in config.data.sources] == [
        tmp_path / "base" / "../corpus/a",
        Path("/abs"),
        Path("here"),
    ]
    assert config.data.evaluation is not None
    assert config.data.evaluation.sources[0].prefix == Path("/home/someone/held")
    assert config.run.output == Path("out")
    assert config.checkpoint.directory == Path("/home/someone/saved")


def test_every_path_of_the_schema_is_one_that_is_read_or_one_that_is_written() -> None:
    from ltf.config.read import READ_PATHS, WRITTEN_PATHS

    def paths(children: Any, place: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = []
        for key, setting in children.items():
            below = (*place, key, "*") if setting.listed else (*place, key)
            if setting.expected.startswith("a path"):
                found.append((*place, key))
            found += paths(setting.children, below)
        return found

    assert sorted(paths(settings(), ())) == sorted([*READ_PATHS, *WRITTEN_PATHS])


def test_every_setting_of_the_schema_is_known_and_explained() -> None:
    def compare(of: Any, children: dict[str, Setting]) -> None:
        fields = of.model_fields if issubclass(of, BaseModel) else {f.name: f for f in dataclasses.fields(of)}
        assert list(children) == list(fields)
        for name, setting in children.items():
            assert setting.meaning, name

    compare(Config, dict(settings()))
    for name, section in settings().items():
        compare(Config.model_fields[name].annotation, dict(section.children))
        for key, setting in section.children.items():
            for inner, below in setting.children.items():
                assert below.meaning, f"{name}.{key}.{inner}"


def test_the_built_in_presets_are_those_that_are_promised() -> None:
    assert set(presets()) == {"tiny", "dense", "qwen3-30b-a3b", "sigma-moe-tiny", "sigma-200b-a20b"}
    assert read("sigma-200b-a20b").parallel.schedule is PipelineSchedule.INTERLEAVED
