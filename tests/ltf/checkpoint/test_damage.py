"""One flipped bit, a short or missing file: found by all ranks, set aside, the one before is used."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ltf.checkpoint import manifest as manifests
from ltf.checkpoint.command import main
from ltf.checkpoint.load import Loaded, LoadError, NothingLoaded, load, shares
from ltf.checkpoint.manifest import FileRecord
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.findings import Finding
from tests.ltf import ranks
from tests.ltf.checkpoint.toy import Toy, flip_bit, join, saver, train


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Good checkpoints of steps 1 and 2, of one rank."""
    _two_checkpoints(tmp_path)
    return tmp_path


def _two_checkpoints(folder: Path) -> None:
    toy = Toy()
    with saver(folder, toy) as writing:
        writing.finished_update(0, {})
        for step in (1, 2):
            toy.work()
            writing.before_update()
            toy.update()
            writing.finished_update(step, {"step": step})
            writing.request()
            writing.wait()


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit of the tensors": ("__0_0.distcp", flip_bit),
    "the last byte of the tensors": ("__0_0.distcp", lambda path: flip_bit(path, 0.999999)),
    "a bit of torch's metadata": (".metadata", flip_bit),
    "a bit of the manifest": ("manifest.json", flip_bit),
    "a bit of the marker": ("COMMITTED", flip_bit),
    "the marker's last byte": ("COMMITTED", lambda path: flip_bit(path, 0.99)),
    "a short file": ("__0_0.distcp", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a missing file": ("__0_0.distcp", Path.unlink),
    "a missing manifest": ("manifest.json", Path.unlink),
    "a missing marker": ("COMMITTED", Path.unlink),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b"")),
    "a folder in a file's place": ("__0_0.distcp", _to_folder),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_is_used(two: Path, damage: str) -> None:
    name, do = DAMAGE[damage]
    do(two / "step-00000002" / name)
    toy = Toy(seed=4)
    loaded = load(Store(two), toy.state, seed=0)
    assert isinstance(loaded, Loaded)
    assert loaded.version == 1
    (finding,) = loaded.findings
    assert finding.kind == "checkpoint.quarantined"
    assert "step-00000002" in finding.message
    # A wrong marker or manifest shows as their not agreeing.
    assert finding.evidence["file"] in {name, "manifest.json" if name == "COMMITTED" else name}
    assert (two / "quarantine" / "step-00000002-bad").is_dir()
    assert [entry.version for entry in Store(two).entries()] == [1]


def test_two_ranks_find_damage_together_whichever_of_them_reads_the_file(tmp_path: Path) -> None:
    ranks.run(_save_three, 2, tmp_path)
    flip_bit(tmp_path / "step-00000003" / "__1_0.distcp")
    flip_bit(tmp_path / "step-00000002" / "__0_0.distcp")
    first, second = ranks.run(_load, 2, tmp_path)
    assert first == second
    version, findings = first
    assert version == 1
    assert [(f.step, f.evidence["file"]) for f in findings] == [(3, "__1_0.distcp"), (2, "__0_0.distcp")]


def _save_three(folder: Path) -> None:
    join()
    toy = Toy()
    with saver(folder, toy, keep_last=3, background=False) as writing:
        train(toy, writing, 0, 3, save_at=(1, 2, 3))


def _load(folder: Path) -> tuple[int, list[Finding]]:
    join()
    loaded = load(Store(folder), Toy(seed=4).state, seed=0)
    assert isinstance(loaded, Loaded)
    return loaded.version, loaded.findings


def test_where_nothing_is_good_nothing_is_loaded(two: Path) -> None:
    for step in (1, 2):
        flip_bit(two / f"step-0000000{step}" / "__0_0.distcp")
    toy = Toy(seed=4)
    before = [parameter.detach().clone() for parameter in toy.model.parameters()]
    found = load(Store(two), toy.state, seed=0)
    assert isinstance(found, NothingLoaded)
    assert [finding.step for finding in found.findings] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, toy.model.parameters(), strict=True))


def test_an_empty_or_absent_folder_loads_nothing_without_a_word(tmp_path: Path) -> None:
    assert load(Store(tmp_path / "none"), Toy().state, seed=0) == NothingLoaded([])


def test_a_pickle_that_would_run_something_is_not_obeyed_even_with_a_right_digest(two: Path) -> None:
    ran = two / "ran"
    folder = two / "step-00000002"
    data = pickle.dumps(_Harmful(str(ran)))
    (folder / ".metadata").write_bytes(data)
    plain = json.loads((folder / "manifest.json").read_bytes())
    plain["files"][".metadata"] = {"size": len(data), "sha256": manifests.hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(plain))
    (folder / "COMMITTED").write_bytes(manifests.marker_for((folder / "manifest.json").read_bytes()))
    loaded = load(Store(two), Toy().state, seed=0)
    assert isinstance(loaded, Loaded)
    assert loaded.version == 1
    assert "which metadata never does" in loaded.findings[0].message
    assert not ran.exists()


class _Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_good_checkpoint_of_another_model_is_an_error_and_stays(two: Path) -> None:
    other = torch.nn.Linear(3, 3)
    with pytest.raises(LoadError, match=r"is of another model: .*bias is not in it"):
        load(Store(two), State([other]), seed=0)
    assert [entry.version for entry in Store(two).entries()] == [1, 2]


def test_a_roll_back_sets_newer_checkpoints_aside(two: Path) -> None:
    loaded = load(Store(two), Toy().state, seed=0, at_most=1, abandon_newer=True)
    assert isinstance(loaded, Loaded)
    assert loaded.version == 1
    assert (two / "quarantine" / "step-00000002-abandoned").is_dir()


def test_the_command_lists_and_verifies(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(two)]) == 0
    assert capsys.readouterr().out.count(" good ") == 2
    flip_bit(two / "step-00000001" / "__0_0.distcp")
    assert main(["list", str(two)]) == 0
    assert "bad" not in capsys.readouterr().out
    assert main(["verify", str(two), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["status"], row.get("file")) for row in rows] == [
        (1, "bad", "__0_0.distcp"),
        (2, "good", None),
    ]
    assert main(["list", str(two / "nowhere")]) == 2
    assert main(["verify", str(two / "quarantine")]) == 2
    assert main([]) == 2


def test_the_command_finds_the_checkpoints_of_a_run_by_its_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path}\n"
    _two_checkpoints(tmp_path / "checkpoints")
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" good ") == 2


def test_files_are_divided_by_size() -> None:
    files = {name: FileRecord(size, "") for name, size in {"a": 10, "b": 6, "c": 5, "d": 1}.items()}
    assert shares(files, 2) == [["a", "d"], ["b", "c"]]
    assert shares(files, 6)[4:] == [[], []]
