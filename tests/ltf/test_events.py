"""The event stream: what is written, what survives, and what the documents say of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltf import events
from ltf.events import Found, Phase, Step, Where, Writer, path_of, read
from ltf.findings import Finding, Severity
from ltf.heart import Heart
from tests.ltf import ranks

SCHEMA: dict[str, Any] = json.loads(events.SCHEMA.read_text())
DOC = Path(__file__).resolve().parents[2] / "docs" / "ltf-events.md"
HERE = Where(0, "node001", "cuda:0")
STEP = Step(12, 5.4321, 4096, 0.21)
EXAMPLES: list[events.Event] = [
    events.RunStarted(HERE, 2, 4711, 100, {"python": "3.11"}),
    events.RunStarted(
        HERE,
        2,
        4711,
        100,
        {"python": "3.11"},
        (HERE, Where(1, "node002", "cuda:0")),
        {"run": {"seed": 0, "output": "x"}},
        {"shard": 2},
        {"total": 10, "active": 5},
    ),
    events.Resumed(40, "checkpoints/step-40", events.ResumeReason.RESTART, 1.5),
    STEP,
    Step(
        13, math.nan, 4096, 0.2, 4000, math.inf, 1e-4, True, 2e4, 0.4, 1 << 40, 0.1, 0.0, 0.02, 1.01, 3.0,
        1.5, (0.1, math.nan), {"layers.0": -math.inf},
    ),
    events.Evaluation(40, 3.25, 8192, 2.0),
    events.CheckpointStarted(40, "checkpoints/step-40", events.CheckpointReason.INTERVAL, True),
    events.CheckpointSaved(40, "checkpoints/step-40", 1 << 33, 12.5, 0.3),
    events.CheckpointVerified(40, "checkpoints/step-40", 1 << 33, 3.5),
    events.CheckpointQuarantined(None, "checkpoints/step-40", "checkpoints/bad-40", ("a digest differs",)),
    Found.of(
        Finding("finite.gradient", Severity.ERROR, 41, "not a number", (1,), {"values": [math.nan, 1.0]}),
        (HERE,),
    ),
    events.Balance(60, (8, 4), (6, 6), 12.0, 8.0),
    events.Heartbeat(60, Phase.CHECKPOINT, 3.0, 17, 0.5),
    events.Exited(60, 75, events.ExitReason.SIGNAL, "SIGTERM"),
]  # fmt: skip


def writer(folder: Path, rank: int = 0, **environment: str) -> Writer:
    return Writer(folder, rank, "r1", environment, clock=lambda: 1700000000.123)


def lines(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return list(read(path_of(folder, rank)))


def test_every_kind_of_event_fits_the_schema_and_is_read_back(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for event in EXAMPLES:
            out.write(event)
    written = lines(tmp_path)
    checker = jsonschema.Draft202012Validator(SCHEMA)
    for line in written:
        checker.validate(line)
    assert [line["event"] for line in written] == [event.event for event in EXAMPLES]
    assert {type(event) for event in EXAMPLES} == set(events.KINDS)


def test_the_schema_refuses_what_lacks_a_field_or_has_a_wrong_one(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.write(STEP)
    (line,) = lines(tmp_path)
    checker = jsonschema.Draft202012Validator(SCHEMA)
    assert not checker.is_valid({name: value for name, value in line.items() if name != "loss"})
    assert not checker.is_valid(line | {"loss": "much"})
    assert not checker.is_valid(line | {"event": "stop"})
    assert checker.is_valid(line | {"a_later_versions_field": 1})


def test_schema_and_code_know_the_same_events_and_fields() -> None:
    assert SCHEMA["properties"]["event"]["enum"] == [kind.event for kind in events.KINDS]
    assert [ref["$ref"] for ref in SCHEMA["oneOf"]] == [f"#/$defs/{kind.event}" for kind in events.KINDS]
    for kind in events.KINDS:
        definition = SCHEMA["$defs"][kind.event]
        names = ["event", *(field.name for field in dataclasses.fields(kind))]
        assert list(definition["properties"]) == names == definition["required"], kind


def test_schema_and_code_know_the_same_closed_sets() -> None:
    for kind in events.KINDS:
        for name, hint in typing.get_type_hints(kind).items():
            if isinstance(hint, type) and issubclass(hint, StrEnum):
                assert SCHEMA["$defs"][kind.event]["properties"][name]["enum"] == [str(one) for one in hint]


def _type(schema: dict[str, Any]) -> str:
    match schema:
        case {"$ref": ref}:
            return str(ref).split("/")[-1]
        case {"anyOf": [first, *_]}:
            return f"{_type(first)} or null"
        case {"const": int()}:
            return "integer"
        case {"enum": _}:
            return "string"
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
    return str(schema["type"])


def test_the_documents_tables_say_what_the_schema_says() -> None:
    tables: dict[str, list[tuple[str, ...]]] = {}
    for line in DOC.read_text().splitlines():
        if line.startswith("## "):
            tables[line[3:].strip("`")] = rows = []
        elif line.startswith("| `"):
            rows.append(tuple(cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:3]))
            rows[-1] += (line.split(" | ", 2)[2].removesuffix(" |"),)
    expected = {"In every line": SCHEMA} | {kind.event: SCHEMA["$defs"][kind.event] for kind in events.KINDS}
    assert list(tables) == list(expected)
    for name, definition in expected.items():
        assert tables[name] == [
            (field, _type(schema), schema["description"])
            for field, schema in definition["properties"].items()
            if "description" in schema
        ], name


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_reader_gets_the_same_bits_back(loss: float) -> None:
    out = writer(Path("unused"))
    read_back = json.loads(out._line(dataclasses.replace(STEP, loss=loss)))["loss"]
    assert struct.pack("d", float(read_back)) == struct.pack("d", loss)


def test_what_json_has_no_word_for_is_a_string_that_float_understands(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        for loss in (math.nan, math.inf, -math.inf):
            out.write(dataclasses.replace(STEP, loss=loss))
    text = path_of(tmp_path, 0).read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [line["loss"] for line in lines(tmp_path)] == ["nan", "inf", "-inf"]
    assert math.isnan(float(lines(tmp_path)[0]["loss"]))
    assert float(lines(tmp_path)[2]["loss"]) == -math.inf


def test_evidence_that_json_does_not_know_is_written_as_text(tmp_path: Path) -> None:
    finding = Finding("x", Severity.INFO, 1, "m", evidence={"path": Path("a/b")})  # type: ignore[dict-item]
    writer(tmp_path).write(Found.of(finding))
    assert lines(tmp_path)[0]["evidence"] == {"path": "a/b"}


def test_each_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    writer(tmp_path, rank=3).write(STEP)
    assert [path.name for path in tmp_path.iterdir()] == ["events-rank00003.jsonl"]
    assert lines(tmp_path, 3)[0]["rank"] == 3


@pytest.mark.parametrize("torn", ['{"v": 1, "t": 17', '{"v": 1, "event": "step"}', "\0\0\0", "\xff"])
def test_a_killed_attempts_torn_line_costs_no_later_line(tmp_path: Path, torn: str) -> None:
    writer(tmp_path).write(STEP)
    with path_of(tmp_path, 0).open("a", encoding="latin-1") as file:
        file.write(torn)
    writer(tmp_path, LTP_ATTEMPT="1").write(STEP)
    whole = [line for line in lines(tmp_path) if "step" in line]
    assert [line["attempt"] for line in whole] == [0, 1]
    assert path_of(tmp_path, 0).read_bytes().endswith(b"\n")


def test_a_reader_passes_over_lines_that_are_no_events(tmp_path: Path) -> None:
    path_of(tmp_path, 0).write_bytes(b'7\n[]\n{"a": 1}\n\n{"event": "x"}\n{"event": "y"')
    assert lines(tmp_path) == [{"event": "x"}]


def test_run_and_attempt_come_from_the_launcher(tmp_path: Path) -> None:
    writer(tmp_path, LTP_RUN_ID="job-7", LTP_ATTEMPT="4", TORCHELASTIC_RESTART_COUNT="2").write(STEP)
    writer(tmp_path, TORCHELASTIC_RESTART_COUNT="2").write(STEP)
    assert [(line["run"], line["attempt"]) for line in lines(tmp_path)] == [("job-7", 4), ("r1", 2)]


def test_without_a_launcher_attempts_are_counted_in_the_file(tmp_path: Path) -> None:
    for _ in range(3):
        with writer(tmp_path) as out:
            out.write(EXAMPLES[0])
            out.write(STEP)
    assert [line["attempt"] for line in lines(tmp_path)] == [0, 0, 1, 1, 2, 2]


def test_threads_that_write_at_once_tear_no_line(tmp_path: Path) -> None:
    out = writer(tmp_path)

    def write(first: int) -> None:
        for step in range(first, first + 100):
            out.write(dataclasses.replace(STEP, step=step))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path_of(tmp_path, 0).read_bytes().count(b"\n") == 400
    assert sorted(line["step"] for line in lines(tmp_path)) == list(range(400))


def test_a_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        from pathlib import Path
        from ltf.events import Step, Writer
        out = Writer(Path(sys.argv[1]), 0, "r1", {})
        for step in range(50):
            out.write(Step(step, 1.0, 1, 1.0))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path)] == list(range(50))


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path) -> None:
    heard: list[str] = []
    out = Writer(tmp_path, 0, "r1", {}, complain=heard.append)
    out.write(STEP)
    # The kernel refuses to let files grow any further, in the middle of the next line.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path_of(tmp_path, 0).stat().st_size + 10, hard))
        for step in (13, 14, 15):
            out.write(dataclasses.replace(STEP, step=step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(heard) == 1
    assert os.strerror(errno.EFBIG) in heard[0]
    out.write(dataclasses.replace(STEP, step=16))
    out.write(dataclasses.replace(STEP, step=17))
    assert [(line["event"], line["step"]) for line in lines(tmp_path)] == [
        ("step", 12), ("step", 16), ("finding", -1), ("step", 17),
    ]  # fmt: skip
    assert out.lost == lines(tmp_path)[2]["evidence"]["lines"] == 3
    assert len(heard) == 2
    assert "3 events" in heard[1]


def test_a_folder_that_cannot_be_made_is_tried_again_at_the_next_event(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    heard: list[str] = []
    out = Writer(tmp_path / "run", 0, "r1", {}, complain=heard.append)
    out.write(STEP)
    (tmp_path / "run").unlink()
    out.write(STEP)
    assert [line["event"] for line in lines(tmp_path / "run")] == ["step", "finding"]
    assert len(heard) == 2


def test_a_heartbeat_tells_a_hang_from_a_slow_step(tmp_path: Path) -> None:
    now = 100.0
    heart = Heart(writer(tmp_path), 10.0, clock=lambda: now)
    heart.enter(Phase.STEP, 5)
    for now, advanced in ((110.0, True), (120.0, True), (130.0, False), (140.0, False)):  # noqa: B007
        if advanced:
            heart.advance()
        heart.beat()
    beats = [(line["phase_seconds"], line["progress"], line["quiet_seconds"]) for line in lines(tmp_path)]
    assert beats == [(10.0, 2, 0.0), (20.0, 3, 0.0), (30.0, 3, 10.0), (40.0, 3, 20.0)]
    assert {(line["step"], line["phase"]) for line in lines(tmp_path)} == {(5, "step")}


def waits(events: Iterable[dict[str, Any]]) -> bool:
    """Several heartbeats tell of a silence that grew past a third of a second."""
    quiet = [event["quiet_seconds"] for event in events if event["event"] == "heartbeat"]
    return max(quiet, default=0) > 0.3 and sum(seconds > 0 for seconds in quiet) >= 4


def late_and_waiting(folder: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Writer(Path(folder), rank, "r1", {}) as out, Heart(out, 0.05) as heart:
        heart.enter(Phase.STEP, 1)
        if rank == 1:
            # Late by as much as rank 0 needs to tell that it waits.
            until = time.monotonic() + 60
            told = path_of(Path(folder), 0)
            while time.monotonic() < until and not (told.exists() and waits(read(told))):
                time.sleep(0.02)
        dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def test_a_rank_that_is_blocked_in_a_collective_still_beats(tmp_path: Path) -> None:
    ranks.run(late_and_waiting, 2, str(tmp_path))
    assert waits(lines(tmp_path, 0))
