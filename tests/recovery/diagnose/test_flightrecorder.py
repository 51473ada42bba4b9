"""Reading dumps: what torch wrote, what it documents, and what nobody should load."""

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.diagnose import plainpickle
from recovery.diagnose.flightrecorder import DumpError, parse_dump, read_dumps
from recovery.diagnose.plainpickle import NotPlainError, loads
from recovery.diagnose.recording import State
from recovery.diagnose.waitfor import Diagnosis, Kind, diagnose

from .recorded import document, record

SCENARIOS = (
    "never_enters",
    "other_collective",
    "other_size",
    "lonely_receive",
    "dead",
    "two_axes",
    "swapped_order",
)


@pytest.fixture(scope="session")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps that torch wrote in real hangs of four Gloo ranks, one directory a scenario."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("hung")
    script = Path(__file__).with_name("hanging_ranks.py")
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": "100"}
    subprocess.run(
        [sys.executable, str(script), str(root), *SCENARIOS],
        env=environment,
        check=True,
        timeout=400,
        stderr=subprocess.DEVNULL,
    )
    return root


def _of(hung: Path, scenario: str, ending: str) -> Diagnosis:
    read = read_dumps(sorted((hung / scenario).glob(f"rank_?{ending}")))
    assert not read.skipped
    return diagnose(read.by_rank, world_size=4)


@pytest.mark.torch
@pytest.mark.timeout(420)
@pytest.mark.parametrize("ending", ["", ".json"])
@pytest.mark.parametrize(
    ("scenario", "kind", "culprits"),
    [
        ("never_enters", Kind.STOPPED, (2,)),
        ("other_collective", Kind.MISMATCH, (1,)),
        ("two_axes", Kind.STOPPED, (3,)),
        ("swapped_order", Kind.CYCLE, ()),
    ],
)
def test_real_hangs_of_gloo_ranks_name_who_caused_them(
    hung: Path, scenario: str, kind: Kind, culprits: tuple[int, ...], ending: str
) -> None:
    found = _of(hung, scenario, ending)
    assert (found.kind, found.culprits) == (kind, culprits)


@pytest.mark.torch
@pytest.mark.timeout(420)
def test_a_rank_with_another_size_is_named_though_gloo_aborts_a_peer_for_it(hung: Path) -> None:
    found = _of(hung, "other_size", "")
    assert (found.kind, found.culprits) == (Kind.MISMATCH, (3,))


@pytest.mark.torch
@pytest.mark.timeout(420)
def test_the_frame_of_the_user_is_in_the_evidence(hung: Path) -> None:
    found = _of(hung, "never_enters", "")
    assert any(
        re.search(r"in all_reduce at hanging_ranks\.py:\d+ \(never_enters\)", e) for e in found.evidence
    )


@pytest.mark.torch
@pytest.mark.timeout(420)
def test_gloo_ends_the_operations_of_a_dead_ranks_peers_so_it_is_a_suspect_without_a_dump(hung: Path) -> None:
    found = _of(hung, "dead", "")
    assert found.culprits in ((), (1,))
    assert {*found.culprits, *found.suspects} == {1}


@pytest.mark.torch
@pytest.mark.timeout(420)
def test_gloo_does_not_record_a_receive_so_a_lonely_one_shows_nothing(hung: Path) -> None:
    assert _of(hung, "lonely_receive", "").kind is Kind.NOTHING


@pytest.mark.torch
@pytest.mark.timeout(420)
def test_pickle_and_json_of_one_recording_say_the_same(hung: Path) -> None:
    folder = hung / "two_axes"
    for rank in range(4):
        one = parse_dump((folder / f"rank_{rank}").read_bytes(), rank)
        other = parse_dump((folder / f"rank_{rank}.json").read_bytes(), rank)
        assert [(e.group, e.collective_seq, e.op, e.state) for e in one.entries] == [
            (e.group, e.collective_seq, e.op, e.state) for e in other.entries
        ]
        assert one.progress == other.progress


@pytest.mark.parametrize(
    ("name", "kind"), [("gpu_error_1st", Kind.DEVICE_STALL), ("lock_gil_1st", Kind.STOPPED)]
)
def test_public_dumps_of_injected_faults_name_exactly_the_broken_ranks(
    captures: Path, name: str, kind: Kind
) -> None:
    folder = captures / "flight_recorder" / name
    truth = re.search(r"Fault ranks: \[([\d, ]+)\]", (folder / "fault_injection.log").read_text())
    assert truth is not None
    read = read_dumps([folder])
    assert [Path(s.file).name for s in read.skipped] == ["fault_injection.log"]
    found = diagnose(read.by_rank)
    assert list(found.culprits) == [int(n) for n in truth[1].split(",")]
    assert (found.kind, len(read.by_rank)) == (kind, 16)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["gpu_error_1st", "lock_gil_1st"])
def test_the_restricted_reader_reads_what_the_standard_one_would(captures: Path, name: str) -> None:
    for file in sorted((captures / "flight_recorder" / name).glob("_dump_*")):
        assert loads(file.read_bytes()) == _PlainOnly(io.BytesIO(file.read_bytes())).load()


class _PlainOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> None:
        raise AssertionError(f"{module}.{name}")


# --- what must not be loaded ---------------------------------------------------------------------------


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    touched = tmp_path / "touched"
    data = pickle.dumps({"entries": [_Runs(f"touch {touched}")]}, protocol=protocol)
    with pytest.raises(DumpError):
        parse_dump(data, 0)
    assert not touched.exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(len, protocol=2),
        pickle.dumps({1, 2}, protocol=4),
        pickle.dumps(bytearray(b"x"), protocol=5),
        pickle.dumps(object(), protocol=4),
        pickle.dumps({(1, 2): 3}, protocol=2),
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02h\x07.",
        b"\x80\x02]}e.",
        b"\x80\x02]NNu.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02N2.",
        b"\x80\x09N.",
        b"\x80\x02NN.",
        b"\x80\x02",
        b"",
    ],
)
def test_what_is_not_plain_data_is_refused(data: bytes) -> None:
    with pytest.raises(NotPlainError):
        loads(data)


def test_more_objects_than_a_dump_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plainpickle, "MAX_OBJECTS", 1000)
    with pytest.raises(NotPlainError, match="objects"):
        loads(b"\x80\x02" + b"]" * 1100 + b".")


def test_deep_nesting_without_marks_does_no_harm() -> None:
    with pytest.raises(DumpError):
        parse_dump(b"\x80\x02" + b"N" + b"\x85" * 200_000 + b".", 0)


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(_PLAIN, st.integers(3, 5))
def test_plain_data_comes_back_as_it_was(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol=protocol)) == value


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_dump_is_read_or_refused_but_never_breaks_the_reader(data: st.DataObject) -> None:
    whole = pickle.dumps(document([record(0, "all_reduce", 1)], {0: (0, 1)}), protocol=2)
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DumpError):
        diagnose({0: parse_dump(bytes(broken), 0)})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(record(0, "x", 1))), _PLAIN))
def test_fields_of_any_shape_never_break_the_reader(strange: dict) -> None:
    made = document([{**record(0, "all_reduce", 1), **strange}], {0: (0, 1)})
    diagnose({0: parse_dump(pickle.dumps(made, protocol=4), 0)})


# --- files ---------------------------------------------------------------------------------------------


def test_broken_truncated_and_foreign_files_are_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    good = pickle.dumps(document([record(0, "all_reduce", 1)], {0: (0, 1)}), protocol=2)
    (tmp_path / "trace_0").write_bytes(good)
    (tmp_path / "trace_1").write_bytes(good[:-40])
    (tmp_path / "trace_2").write_bytes(b"")
    (tmp_path / "trace_3.json").write_text('{"entries": [')
    (tmp_path / "trace_4").write_bytes(pickle.dumps(print))
    (tmp_path / "trace_5.json").write_text('{"loss": 1.5}')
    (tmp_path / "trace_00").write_bytes(good)
    (tmp_path / "notes.txt").write_text("hello")
    read = read_dumps([tmp_path, tmp_path / "gone_7"])
    assert list(read.by_rank) == [0]
    reasons = {Path(s.file).name: s.reason for s in read.skipped}
    assert reasons["trace_1"] == "refused: truncated or broken"
    assert reasons["trace_2"] == "empty file"
    assert reasons["trace_3.json"] == "broken JSON"
    assert reasons["trace_4"].startswith("refused: opcode")
    assert reasons["trace_5.json"].startswith("not a flight-recorder dump")
    assert reasons["trace_00"] == "another dump of rank 0 was read before it"
    assert reasons["notes.txt"] == "the name does not end in a rank"
    assert reasons["gone_7"] == "No such file or directory"


def test_json_with_counters_as_strings_and_no_entries_is_a_dump() -> None:
    made = document([], {0: (0, 1)}, status={"0": {"last_enqueued_collective": "9"}})
    del made["entries"]
    read = parse_dump(json.dumps(made).encode(), 3)
    assert (read.rank, read.entries, read.progress["0"].enqueued) == (3, (), 9)
    assert read.groups["0"].ranks == (0, 1)


def test_an_entry_is_read_with_peers_times_sizes_and_frames() -> None:
    made = record(2, "recv 3<-1", 5, p2p=True, state="completed", size=(2, 3), number=7)
    entry = parse_dump(pickle.dumps(document([made], {2: (8, 9, 10, 11)}), protocol=4), 11).entries[0]
    assert (entry.op, entry.backend, entry.peers, entry.is_p2p) == ("recv", "nccl", (1, 3), True)
    assert (entry.state, entry.p2p_seq, entry.input_sizes) == (State.COMPLETED, 5, ((2, 3),))
    assert (entry.frames[1].function, entry.frames[1].line, entry.timeout_ms) == ("step", 88, 600_000)


def test_many_completed_entries_are_cut_but_every_unfinished_one_is_kept() -> None:
    done = [record(0, "all_reduce", n, state="completed", number=n) for n in range(1, 500)]
    open_ones = [record(0, "all_reduce", n, number=n) for n in range(500, 700)]
    read = parse_dump(pickle.dumps(document([*done, *open_ones], {0: (0,)}), protocol=2), 0)
    assert (len(read.unfinished), len(read.entries)) == (200, 264)
    assert (read.progress["0"].enqueued, read.progress["0"].completed) == (699, 499)
