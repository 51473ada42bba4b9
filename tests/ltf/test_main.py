from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ltf import __main__ as command
from ltf.__main__ import COMMANDS, main


def test_help_lists_every_command_with_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:")[2].partition("exit status:")[0]
    for name in COMMANDS:
        assert f"\n  {name}" in shown
        assert f"ltf {name}" in examples
    for status in ("0 ", "1 ", "2 ", "130 ", "143 "):
        assert f"\n  {status}" in shown.partition("exit status:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_is_there(name: str) -> None:
    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


def test_no_command_at_all_shows_the_usage_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m ltf" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: no command 'trian'; did you mean 'train'?\n"
    assert main(["xyz"]) == 2
    assert "expected one of train, estimate," in capsys.readouterr().err


def test_every_mistake_in_a_configuration_is_a_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: tiny\nrun: {stepps: 4}\nmodl: {}\n")
    assert main(["estimate", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0].startswith(f"error: {file}:2: run.stepps: found an unknown key")
    assert said.err.splitlines()[1].startswith(f"error: {file}:3: modl: found an unknown key")
    assert len(said.err.splitlines()) == 2


def test_a_mistake_in_data_is_a_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_real_process_ends_with_the_status_and_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ltf", "estimate", "tiny", "--set", "model.layers=none"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --set model.layers=none: model.layers: found the text 'none', expected"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    command = f"{sys.executable} -m ltf estimate tiny --json; echo $? >&2"
    done = subprocess.run(
        # The reader is gone before anything is written.
        ["bash", "-c", f"exec 3> >(exec true); wait $!; {{ {command}; }} >&3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == "141\n"


def test_an_interruption_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltf.estimate.main", interrupted)
    assert main(["estimate", "tiny"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_package_is_named_with_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ltf.export", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["export", "run", "out"]) == 2
    assert capsys.readouterr().err == "error: export needs torch: pip install 'ltpctl[train]'\n"


def test_nothing_heavy_is_imported_before_a_command_is_known() -> None:
    code = "import sys, ltf.__main__ as m; m.main(['--help']); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("set()\n")
    assert command.COMMANDS
