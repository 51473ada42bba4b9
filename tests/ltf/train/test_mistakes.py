"""Whatever a person asks for wrongly: one line that says it, the right exit status, and nothing half done."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ltf.model.args import ModelArgs, MoEArgs
from ltf.model.decoder import Decoder
from ltf.model.hf import export
from ltf.train.lock import NAME
from tests.ltf import ranks

from .runs import Runs


@dataclass(frozen=True)
class Answer:
    status: int
    lines: tuple[str, ...]


def ask(sets: list[list[str]], nodes: list[str], config: str) -> tuple[int, str]:
    """In a warm rank: the command with that rank's own overrides; exit status and what it said."""
    from ltf.__main__ import main

    rank = int(os.environ["RANK"])
    if nodes:
        os.environ["LTP_NODE"] = nodes[rank]
        os.environ["LOCAL_RANK"] = str(nodes[:rank].count(nodes[rank]))
    if "HIDE" in os.environ:
        sys.path.insert(0, os.environ["HIDE"])
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main(["train", config, *(f"--set={text}" for text in sets[rank % len(sets)])])
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
    return status, error.getvalue()


def asked(
    config: Path | str,
    *sets: list[str],
    world: int = 2,
    environment: Mapping[str, str] | None = None,
    nodes: list[str] | None = None,
) -> list[Answer]:
    """Each rank's answer; `sets`: the overrides of each rank, or of all."""
    found = ranks.run(
        ask, world, list(sets) or [[]], nodes or [], str(config), timeout=60, environment=environment
    )
    return [Answer(status, tuple(text.splitlines())) for status, text in found]


@dataclass(frozen=True)
class Mistake:
    """`says`: parts of the one line. `sets`: overrides by rank. `prepare`: makes things wrong on the disk."""

    says: tuple[str, ...]
    sets: tuple[list[str], ...] = ([],)
    world: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Path, Path], None] = lambda corpus, folder: None


def copy(corpus: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus.with_suffix(suffix), folder / f"copy{suffix}")
    return folder / "copy"


def cut(suffix: str) -> Callable[[Path, Path], None]:
    def prepare(corpus: Path, folder: Path) -> None:
        file = copy(corpus, folder).with_suffix(suffix)
        os.truncate(file, file.stat().st_size - 1000)

    return prepare


def spoil(corpus: Path, folder: Path) -> None:
    """The index begins with something else."""
    file = copy(corpus, folder).with_suffix(".idx")
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def file_in_the_way(corpus: Path, folder: Path) -> None:
    (folder / "way").write_text("not a folder\n")


def weights_of_width_16(corpus: Path, folder: Path) -> None:
    args = ModelArgs(
        vocab_size=272, layers=4, width=16, heads=4, kv_heads=2, head_dim=8, max_positions=64,
        moe=MoEArgs(experts=8, top_k=2, expert_width=32),
    )  # fmt: skip
    export(Decoder(args).state_dict(), args, folder / "weights")


COPY = "data.sources.0.prefix={folder}/copy"
MISTAKES = {
    "data that is missing": Mistake(("nowhere", "no such"), (["data.sources.0.prefix=nowhere"],)),
    "data that is missing on one rank": Mistake(
        ("rank 1: ", "nowhere"), ([], ["data.sources.0.prefix=nowhere"])
    ),
    "data that is truncated": Mistake(("copy.bin", "byte"), ([COPY],), prepare=cut(".bin")),
    "data that is truncated on one rank": Mistake(
        ("rank 1: ", "copy.bin"), ([], [COPY]), prepare=cut(".bin")
    ),
    "an index that is truncated": Mistake(("copy.idx",), ([COPY],), prepare=cut(".idx")),
    "an index that is something else": Mistake(("copy.idx", "byte 0"), ([COPY],), prepare=spoil),
    "no data at all": Mistake(("data.sources", "found no source"), (["data.sources=[]"],)),
    "data of another vocabulary": Mistake(("vocab",), (["model.vocab_size=64", "data.pad=0"],)),
    "an output folder that is a file": Mistake(
        ("way is a file", "run.output"), (["run.output={folder}/way"],), prepare=file_in_the_way
    ),
    "an output folder under a file": Mistake(
        ("way is a file", "run.output"), (["run.output={folder}/way/run"],), prepare=file_in_the_way
    ),
    "an output folder that cannot be written": Mistake(("/proc/run",), (["run.output=/proc/run"],)),
    "a checkpoint folder that is a file": Mistake(
        ("way is a file",), (["checkpoint.directory={folder}/way"],), prepare=file_in_the_way
    ),
    "an output folder that one rank cannot use": Mistake(
        ("rank 1: ", "way is a file"), ([], ["run.output={folder}/way"]), prepare=file_in_the_way
    ),
    "more steps than the data may be repeated for": Mistake(
        ("max_epochs",), (["data.sources.0.max_epochs=0.5", "run.steps=100000"],)
    ),
    "degrees that do not fit the ranks": Mistake(("parallel", "2 ranks"), (["parallel.replicate=3"],)),
    "a batch that does not divide": Mistake(("batch.samples", "multiple of 4"), (["batch.samples=6"],)),
    "more stages than layers": Mistake(("parallel.pipeline", "4 stages"), (["parallel.pipeline=8"],)),
    "a device of no kind": Mistake(("run.device", "abacus"), (["run.device=abacus"],)),
    "a device that is not here": Mistake(("run.device", "no accelerator"), (["run.device=xpu"],)),
    "an unknown setting": Mistake(("model.layres", "did you mean 'layers'"), (["model.layres=2"],)),
    "a value of the wrong kind": Mistake(("model.layers", "four"), (["model.layers=four"],)),
    "an override without a value": Mistake(("model.layers",), (["model.layers"],)),
    "a drill that is no JSON": Mistake(("LTF_DRILL",), environment={"LTF_DRILL": "now"}),
    "a drill with an unknown fault": Mistake(
        ("LTF_DRILL", "earthquake"),
        environment={"LTF_DRILL": json.dumps({"fault": "earthquake", "rank": 0, "step": 1})},
    ),
    "first weights that are not there": Mistake(
        ("weights-nowhere",), (["run.initial_weights=weights-nowhere"],)
    ),
    "first weights that one rank does not have": Mistake(
        ("rank 1: ", "weights-nowhere"), ([], ["run.initial_weights=weights-nowhere"])
    ),
    "first weights of another shape": Mistake(
        ("shape (272, 16)", "(272, 32)"),
        (["run.initial_weights={folder}/weights"],),
        prepare=weights_of_width_16,
    ),
}


@pytest.fixture
def small(runs: Runs) -> Runs:
    """A run that would train a step if it were let."""
    runs.settings["run"]["steps"] = 4
    return runs


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_on_a_node_and_nothing_is_begun(
    name: str, small: Runs, corpus: Path, tmp_path: Path
) -> None:
    mistake = MISTAKES[name]
    mistake.prepare(corpus, tmp_path)
    sets = [[text.format(folder=tmp_path) for text in each] for each in mistake.sets]
    config = small.config("run", {})
    answers = asked(config, *sets, world=mistake.world, environment=mistake.environment)
    assert [answer.status for answer in answers] == [2] * mistake.world
    said = [line for answer in answers for line in answer.lines]
    assert len(said) == 1, said
    for part in ("error: ", *mistake.says):
        assert part in said[0]
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_on_two_nodes_each_node_says_it_once(small: Runs) -> None:
    config = small.config("run", {})
    wrong = ["data.sources.0.prefix=nowhere"]
    everywhere = asked(config, wrong, world=4, nodes=["one", "one", "two", "two"])
    assert [len(answer.lines) for answer in everywhere] == [1, 0, 1, 0]
    on_one = asked(config, [], [], [], wrong, world=4, nodes=["one", "one", "two", "two"])
    assert [answer.status for answer in on_one] == [2, 2, 2, 2]
    assert [len(answer.lines) for answer in on_one] == [1, 0, 0, 1]
    assert on_one[0].lines[0] == "error: rank 3 could not go on; see its output"
    assert "nowhere" in on_one[3].lines[0]


@pytest.mark.parametrize("asks", ["tinny", "missing.yaml"])
def test_a_configuration_that_is_not_there_is_one_line(asks: str) -> None:
    answers = asked(asks)
    assert [answer.status for answer in answers] == [2, 2]
    [line] = [line for answer in answers for line in answer.lines]
    assert asks in line


@pytest.mark.parametrize(
    ("setting", "says"),
    [("model.width=48", "of another model"), ("model.layers=3", "of another model")],
)
def test_a_checkpoint_of_another_model_is_refused_and_stays(small: Runs, setting: str, says: str) -> None:
    told = small.warm("run", 2)
    kept = sorted(path.name for path in (told.folder / "checkpoints").glob("step-*"))
    answers = asked(small.config("run", {}), [setting])
    assert [answer.status for answer in answers] == [2, 2]
    [line] = [line for answer in answers for line in answer.lines]
    assert says in line
    assert sorted(path.name for path in (told.folder / "checkpoints").glob("step-*")) == kept


def test_without_tensorboard_its_setting_is_refused(small: Runs, tmp_path: Path) -> None:
    (tmp_path / "hide" / "tensorboard").mkdir(parents=True)
    (tmp_path / "hide" / "tensorboard" / "__init__.py").write_text("raise ImportError('hidden')\n")
    answers = asked(
        small.config("run", {}),
        ["output.tensorboard=true"],
        environment={"HIDE": str(tmp_path / "hide")},
    )
    assert [answer.status for answer in answers] == [2, 2]
    [line] = [line for answer in answers for line in answer.lines]
    assert "output.tensorboard" in line
    assert "pip install tensorboard" in line


def test_a_second_run_in_the_same_folder_is_refused_by_name(small: Runs) -> None:
    first = small.start("run", run__steps=100_000)
    first.when(lambda events: any(event["event"] == "checkpoint_saved" for event in events))
    kept = {path.name for path in (first.folder / "checkpoints").glob("step-*")}
    answers = asked(small.config("run", {}))
    events = first.folder / "events-rank00001.jsonl"
    assert [answer.status for answer in answers] == [75, 75]
    [line] = [line for answer in answers for line in answer.lines]
    assert f"process {first.children[0].pid} on " in line
    assert "is in use by" in line
    assert not events.exists(), "the refused run wrote events"
    assert kept
    first.signal(9)
    first.wait()
    # The lock dies with its holder, however that ended.
    assert (first.folder / NAME).exists()
    assert small.warm("run", 2).statuses == [0, 0]


def test_two_runs_that_share_only_the_checkpoints_are_kept_apart(small: Runs, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"checkpoint__directory": str(tmp_path / "shared")}
    first = small.start("one", run__steps=100_000, **shared)
    first.when(lambda events: any(event["event"] == "step" for event in events))
    answers = asked(small.config("two", {"checkpoint.directory": str(tmp_path / "shared")}))
    first.signal(9)
    first.wait()
    assert [answer.status for answer in answers] == [75, 75]
