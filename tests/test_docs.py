"""The generated reference is what code and data say today; the guides' commands and links work."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltf.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TRAINING = ROOT / "examples" / "training"


def test_the_generated_reference_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, content in generate.pages().items():
        assert (DOCS / "reference" / name).read_text() == content, f"{name} is stale: run `make docs`"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.name))
def test_every_link_to_a_file_leads_to_one(guide: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", guide.read_text()):
        assert (guide.parent / target).exists(), f"{guide.name} links to {target}"


def test_every_guide_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    for guide in DOCS.glob("*.md"):
        assert guide.name == "README.md" or f"({guide.name})" in index


@pytest.mark.parametrize(("file", "world"), [("run.yaml", 2), ("nodes.yaml", 64)])
def test_the_training_examples_are_right_for_the_ranks_that_they_are_meant_for(
    file: str, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(TRAINING / file), "--world", str(world)]) == 0
    assert capsys.readouterr().out.startswith(f"{world} ranks: ")


def test_the_slurm_script_gives_every_rank_what_torchrun_would(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for python, both of which say what they were given."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "scontrol": 'if [ "$1" = show ]; then printf "node007\\nnode008\\n"; else echo "scontrol $*"; fi',
        "srun": 'shift; export SLURM_PROCID=3 SLURM_LOCALID=1 SLURMD_NODENAME=node008; "$@"',
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $LTP_NODE $LTP_ATTEMPT $*"\n'
        "exit 143",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "x",
        "SLURM_JOB_ID": "41234",
        "SLURM_NTASKS": "4",
        "SLURM_RESTART_COUNT": "2",
    }
    done = subprocess.run(
        ["bash", TRAINING / "nodes.sbatch", "run.yaml", "--set", "run.name=two words"],
        env={"PATH": f"{commands}:{os.environ['PATH']}", **slurm},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert done.stdout.splitlines() == [
        "3/4 1 node007:21234 node008 2 -m ltf train run.yaml --set run.name=two words",
        "scontrol requeue 41234",
    ]


def test_every_option_of_the_trainer_that_a_guide_names_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    helps: dict[str, str] = {}
    seen = 0
    for guide in GUIDES:
        for command in _commands(guide.read_text()):
            name, *arguments = command
            if name == "data":
                name = f"data {arguments[0]}"
            if name not in helps:
                with contextlib.suppress(SystemExit):
                    main([*name.split(), "--help"])
                helps[name] = capsys.readouterr().out
            for option in arguments:
                if option.startswith("-"):
                    seen += 1
                    assert re.search(rf"(?<![\w-]){option.split('=')[0]}\b", helps[name]), (
                        f"{guide.name}: {name} {option}"
                    )
    assert seen > 10


@pytest.mark.timeout(300)
def test_the_first_run_of_the_guide_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands, one after another, in a folder as a clone has it; the training is made short."""
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    shutil.copytree(TRAINING, tmp_path / "examples" / "training")
    shutil.copy(ROOT / "README.md", tmp_path)
    guide = (DOCS / "ltf-running.md").read_text()
    first = guide.partition("## A first run")[2].partition("\n## ")[0]
    commands = re.findall(r"^```sh\n(.*?)^```", first, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in commands for line in block.splitlines()]
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = [found for word in shlex.split(line) for found in sorted(glob.glob(word)) or [word]]
        if words[:3] == ["python", "-m", "ltf"]:
            assert main(words[3:]) == 0, line
        else:
            _trained(words)
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def _trained(words: list[str]) -> None:
    assert words[0] == "torchrun"
    short = ["run.steps=4", "optimizer.warmup_steps=2", "checkpoint.every_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:], *(f"--set={one}" for one in short)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout


def _commands(text: str) -> Iterator[list[str]]:
    """The trainer's commands in blocks of code, each by its words behind `ltf`."""
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:\S+='.*' )?(?:torchrun .*|python )-m ltf (\S.*)", line)
            if found and "[" not in line:
                yield shlex.split(found[1], comments=True)
