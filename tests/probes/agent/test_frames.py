"""The decoder takes whatever a node prints, in pieces of any size, and never believes more than it may."""

import itertools
import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.agent.frames import FRAME_BYTES, Decoder
from probes.model import CheckRecord, Measure, Status

NONCE = "0123456789abcdef"


def frame(message: object, nonce: str = NONCE) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return b"\x1eltp1 " + nonce.encode() + b" " + body + b"\n"


def record(check: str = "host.memory", **fields: object) -> dict[str, object]:
    return {
        "check": check,
        "status": "answered",
        "seconds": 0.01,
        "measures": [["total", None, 1024], ["temperature", "0", 41.0]],
        "evidence": ["MemTotal"],
        "detail": "",
        **fields,
    }


def decoded(*pieces: bytes, checks: tuple[str, ...] = ("host.memory", "host.cpu")) -> Decoder:
    decoder = Decoder(NONCE, checks)
    for piece in pieces:
        decoder.feed(piece, now=1000.0)
    return decoder


GOOD = CheckRecord(
    "host.memory",
    Status.ANSWERED,
    0.01,
    (Measure("total", None, 1024), Measure("temperature", "0", 41.0)),
    ("MemTotal",),
)
HELLO = {"agent": 1, "time": 1002.5, "hostname": "n1", "vendors": ["accelerator", "nvidia"], "odd": {"a": 1}}
STREAM = frame({"hello": HELLO}) + frame(record()) + frame({"done": True, "seconds": 1.5})


@given(cuts=st.lists(st.integers(0, len(STREAM) + 40), max_size=12), banner=st.binary(max_size=40))
def test_frames_are_found_in_pieces_of_any_size_behind_any_banner(cuts: list[int], banner: bytes) -> None:
    stream = banner + STREAM
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]
    decoder = decoded(*(stream[a:b] for a, b in itertools.pairwise(edges)))
    assert decoder.records == {"host.memory": GOOD}
    assert decoder.hello["hostname"] == "n1"
    assert decoder.done
    assert decoder.faults == []


def test_hello_gives_scalars_and_the_clock_offset() -> None:
    hello = decoded(STREAM).hello
    assert hello["vendors"] == "accelerator,nvidia"
    assert hello["clock_offset"] == 2.5
    assert "odd" not in hello


def test_feed_returns_the_records_that_a_piece_completed() -> None:
    decoder = Decoder(NONCE, ["host.memory"])
    data = frame(record())
    assert decoder.feed(data[:50], 0.0) == []
    assert decoder.feed(data[50:], 0.0) == [GOOD]


def test_what_did_not_come_is_missing_with_the_reason() -> None:
    records = decoded(frame(record())).complete("the connection was lost")
    assert list(records) == ["host.memory", "host.cpu"]
    assert records["host.cpu"] == CheckRecord("host.cpu", Status.MISSING, detail="the connection was lost")


def test_another_nonce_is_noise() -> None:
    assert decoded(frame(record(), nonce="f" * 16)).records == {}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (frame(b'{"check": "host.memory", "sta'), "a frame that is not JSON"),
        (frame(b"\xff\xfe"), "a frame that is not JSON"),
        (frame(b"[" * 100_000), "a frame that is not JSON"),
        (frame(b'{"check":"host.memory","seconds":' + b"9" * 5000 + b"}"), "a frame that is not JSON"),
        (frame([1, 2]), "a frame that is not an object"),
        (frame({"surprise": 1}), "a frame of an unknown kind"),
        (frame({"done": "yes"}), "a frame of an unknown kind"),
        (frame(record("host.unasked")), "a record of a check that was not asked for: host.unasked"),
        (frame(record(check=["a"])), "a record of a check that was not asked for"),  # type: ignore[arg-type]
        (b"\x1eltp1 " + NONCE.encode() + b' {"check": "ho', ""),
    ],
)
def test_a_broken_frame_is_a_fault_and_the_next_one_counts(data: bytes, fault: str) -> None:
    decoder = decoded(data, frame(record()))
    assert decoder.records == {"host.memory": GOOD}
    assert decoder.faults[0].startswith(fault or "a frame was cut off by another one")


def test_only_the_first_record_of_a_check_counts() -> None:
    decoder = decoded(frame(record()), frame(record(status="error", detail="late")))
    assert decoder.records == {"host.memory": GOOD}
    assert decoder.faults == ["a second record of host.memory"]


@pytest.mark.parametrize("size", [FRAME_BYTES + 10, 5 * FRAME_BYTES])
@pytest.mark.parametrize("piece", [1 << 16, 1 << 30])
def test_an_oversized_frame_is_dropped_in_bounded_memory(size: int, piece: int) -> None:
    stream = frame(record(detail="x" * size)) + frame(record("host.cpu"))
    decoder = Decoder(NONCE, ["host.memory", "host.cpu"])
    for at in range(0, len(stream), piece):
        decoder.feed(stream[at : at + piece], 0.0)
        assert len(decoder._rest) <= FRAME_BYTES + len(NONCE) + 10
    assert set(decoder.records) == {"host.cpu"}
    assert decoder.faults == ["a frame of more than 1024 KiB"]


@pytest.mark.parametrize("size", [FRAME_BYTES - 200, FRAME_BYTES + 200])
def test_a_large_frame_in_small_pieces_costs_no_more_than_its_length(size: int) -> None:
    stream = frame(record(measures=[["total", None, 1]], evidence=["x" * size])) + frame(record("host.cpu"))
    pieces = [stream[at : at + 64] for at in range(0, len(stream), 64)]
    began = time.process_time()
    decoder = decoded(*pieces)
    spent = time.process_time() - began
    assert set(decoder.records) == ({"host.memory"} if size < FRAME_BYTES else set()) | {"host.cpu"}
    # Measured 0.02 s; 3 s when every piece was joined to all that had come before it.
    assert spent < 0.5


def test_endless_noise_is_not_kept() -> None:
    decoder = decoded(*(b"x" * 65536 for _ in range(64)), frame(record()))
    assert decoder.records == {"host.memory": GOOD}


def test_faults_are_capped() -> None:
    assert len(decoded(*(frame(b"{") for _ in range(1000))).faults) == 20


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_number_that_is_not_finite_makes_the_record_an_error(number: bytes) -> None:
    body = b'{"check":"host.memory","status":"answered","measures":[["total",null,' + number + b"]]}"
    found = decoded(frame(body)).records["host.memory"]
    assert found.status is Status.ERROR
    assert found.detail == "total: not a finite number"
    assert found.measures == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "fantastic"},
        {"status": "missing"},
        {"status": 7},
        {"measures": None},
        {"measures": []},
        {"measures": [["total", None]]},
        {"measures": [["total", 0, 1]]},
        {"measures": [["total", None, [1]]]},
        {"measures": [[None, None, 1]]},
        {"measures": [["total", None, 1]] * 6000},
    ],
)
def test_a_malformed_record_is_an_error_never_an_answer(fields: dict[str, object]) -> None:
    found = decoded(frame(record(**fields))).records["host.memory"]
    assert found.status is Status.ERROR
    assert found.measures == ()
    assert found.detail


def test_text_from_a_node_is_harmless_to_terminals_and_stores() -> None:
    hostile = "\x1b]0;owned\x07\udce9" + "y" * 5000
    found = decoded(
        frame(record(measures=[["text", hostile, hostile]], evidence=[hostile, 7] * 100, detail=hostile))
    ).records["host.memory"]
    shown = [found.detail, *found.evidence, str(found.measures[0].value), str(found.measures[0].device)]
    for text in shown:
        assert "\x1b" not in text
        assert "\x07" not in text
        assert len(text.encode()) < 5000
    assert len(found.evidence) <= 60


def test_what_is_shown_as_one_line_is_one_line() -> None:
    sent = "lost\nnode042: healthy\r\nand\u2028more"
    decoder = decoded(
        frame({"hello": {"hostname": sent}}),
        frame(record(measures=[["text", sent, sent]], evidence=[sent], detail=sent)),
        frame(record("host.cpu", status="error", measures=[], evidence=[], detail=sent)),
        frame(record("host.\nunasked")),
    )
    found = decoder.records["host.memory"]
    said = decoder.records["host.cpu"].detail
    assert said == "lost node042: healthy and more"
    assert [found.detail, *found.evidence, found.measures[0].device] == [said] * 3
    assert decoder.hello["hostname"] == said
    assert decoder.faults == ["a record of a check that was not asked for: host. unasked"]
    # A value is what the node says that it is.
    assert str(found.measures[0].value).startswith("lost\nnode042")


def test_half_a_surrogate_pair_costs_that_character_and_not_the_record() -> None:
    body = b'{"check":"host.memory","status":"answered","measures":[["name",null,"a\\udce9b"]]}'
    assert decoded(frame(body)).records["host.memory"].measures == (Measure("name", None, "a\ufffdb"),)


def test_values_that_compare_equal_keep_their_own_kind_whatever_came_before() -> None:
    values = [1, True, 1.0, "1", 0, False, 0.0, "", None]
    for order in (values, values[::-1]):
        measures = [["m", device, value] for value in order for device in (None, "0")]
        found = decoded(frame(record(measures=measures))).records["host.memory"].measures
        assert [(m.device, repr(m.value)) for m in found] == [(d, repr(v)) for _, d, v in measures]


def test_nodes_that_send_ever_new_and_long_text_leave_nothing_behind() -> None:
    def send(rounds: range) -> None:
        for n in rounds:
            measures = [[f"m{n}", f"{n}.{m}" + "d" * 190, "v" * 3000 + f"{n}.{m}"] for m in range(200)]
            short = [[f"m{n}", f"{n}.{m}", n + m / 7] for m in range(200)]
            assert decoded(frame(record(measures=measures + short))).records["host.memory"].measures

    tracemalloc.start()
    try:
        send(range(100))
        before, _ = tracemalloc.get_traced_memory()
        send(range(100, 300))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 120 MB came by. What is remembered of the short ones is bounded: at most some 7 MB.
    assert after < 8 << 20
    assert after - before < 4 << 20


def test_a_huge_whole_number_still_fits_a_store() -> None:
    found = decoded(frame(record(measures=[["total", None, 10**30], ["more", None, 10**400]]))).records[
        "host.memory"
    ]
    assert [m.value for m in found.measures] == [1e30, None]


@pytest.mark.parametrize("seconds", [-1, 1e400, "x", None, True])
def test_a_senseless_duration_is_zero(seconds: object) -> None:
    body = json.dumps(record(seconds=seconds)).encode()
    assert decoded(frame(body)).records["host.memory"].seconds == 0.0


@pytest.mark.parametrize("varying", [False, True])
def test_sixty_records_decode_in_well_under_two_milliseconds_of_cpu(varying: bool) -> None:
    names = [f"host.check{n}" for n in range(60)]
    values = itertools.count(0.5) if varying else itertools.repeat(0.5)
    best = 1.0
    for _ in range(10):
        stream = b"".join(
            frame(record(name, measures=[[f"metric{m}", str(m), next(values)] for m in range(8)]))
            for name in names
        )
        decoder = Decoder(NONCE, names)
        began = time.process_time()
        decoder.feed(stream, 0.0)
        best = min(best, time.process_time() - began)
        assert len(decoder.records) == 60
    # Measured 0.5 ms, and 1.1 ms where no value comes twice; the bound leaves room for a slower machine.
    assert best < 0.006
