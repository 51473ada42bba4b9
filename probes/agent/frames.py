"""Controller side: the bytes that a node prints become the agent's words. Trusts nothing of what it reads.

decoder = Decoder(nonce, bundled.checks)
for record in decoder.feed(chunk, now):     # as they come
    ...
records = decoder.complete("the connection was lost")
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import from_json

from probes.model import CheckRecord, Measure, Status, Value

FRAME_BYTES = 1 << 20
MEASURES = 5000
LINES, LINE_LENGTH = 60, 1000
TEXT_LENGTH = 4096
NAME_LENGTH = 200
FAULTS = 20

_FROM_NODE = {s.value: s for s in Status if s is not Status.MISSING}
_INT_LIMIT = 1 << 63
"""A larger whole number becomes a float: no store holds it."""


class Decoder:
    """Takes stdout piece by piece. `records` holds the first record of each expected check."""

    def __init__(self, nonce: str, checks: Iterable[str]) -> None:
        self.hello: dict[str, Value] = {}
        self.records: dict[str, CheckRecord] = {}
        self.done = False
        self.clean = True
        """False: the agent says that a process which it started outlived SIGKILL (stuck in the kernel)."""
        self.seconds = 0.0
        """The agent's own count of its run."""
        self.faults: list[str] = []
        """What was wrong in what came, capped: broken, oversized or repeated frames, checks not asked for."""
        self._expected = tuple(checks)
        self._names = frozenset(self._expected)
        self._head = b"\x1eltp1 " + nonce.encode("ascii") + b" "
        self._rest = bytearray()
        self._inside = False
        """`_rest` begins with a head, and has no newline."""
        self._skipping = False

    def feed(self, chunk: bytes, now: float) -> list[CheckRecord]:
        """Records that this piece completed. `now`: Unix time of its arrival, for the node's clock offset."""
        found: list[CheckRecord] = []
        at = 0
        if self._skipping:
            end = chunk.find(b"\n")
            if end < 0:
                return found
            at, self._skipping = end + 1, False
        if self._inside and b"\n" not in chunk:
            # Not read again from its beginning with every piece: that would be quadratic.
            self._rest += chunk
            self._bound()
            return found
        data = bytes(self._rest) + chunk if self._rest else chunk
        self._rest, self._inside = bytearray(), False
        while True:
            begin = data.find(self._head, at)
            if begin < 0:
                # The last bytes may be the beginning of a head.
                self._rest += data[max(at, len(data) - len(self._head) + 1) :]
                return found
            body = begin + len(self._head)
            end = data.find(b"\n", body)
            if end < 0:
                self._rest += data[begin:]
                self._inside = True
                self._bound()
                return found
            again = data.rfind(self._head, body, end)
            if again >= 0:
                self._fault("a frame was cut off by another one")
                body = again + len(self._head)
            record = self._frame(data[body:end], now)
            if record is not None:
                found.append(record)
            at = end + 1

    def complete(self, why: str) -> dict[str, CheckRecord]:
        """A record of every expected check, in that order: what did not come is MISSING, with the reason."""
        return {n: self.records.get(n) or CheckRecord(n, Status.MISSING, detail=why) for n in self._expected}

    def _bound(self) -> None:
        if len(self._rest) > FRAME_BYTES:
            self._fault(f"a frame of more than {FRAME_BYTES >> 10} KiB")
            self._rest, self._inside, self._skipping = bytearray(), False, True

    def _frame(self, data: bytes, now: float) -> CheckRecord | None:
        if len(data) > FRAME_BYTES:
            self._fault(f"a frame of more than {FRAME_BYTES >> 10} KiB")
            return None
        try:
            frame = _parse(data)
        except (ValueError, RecursionError):
            self._fault("a frame that is not JSON")
            return None
        if not isinstance(frame, dict):
            self._fault("a frame that is not an object")
        elif "check" in frame:
            return self._record(frame)
        elif isinstance(frame.get("hello"), dict):
            self._hello(frame["hello"], now)
        elif frame.get("done") is True:
            self.done = True
            self.clean = frame.get("clean") is not False
            self.seconds = _seconds(frame.get("seconds"))
        else:
            self._fault("a frame of an unknown kind")
        return None

    def _record(self, frame: Mapping[str, Any]) -> CheckRecord | None:
        name = frame["check"]
        if not isinstance(name, str) or name not in self._names:
            self._fault(f"a record of a check that was not asked for: {_line(str(name), 80)}")
            return None
        if name in self.records:
            self._fault(f"a second record of {name}")
            return None
        record = _to_record(name, frame)
        self.records[name] = record
        return record

    def _hello(self, hello: Mapping[Any, Any], now: float) -> None:
        if self.hello:
            self._fault("a second hello")
            return
        for key, value in list(hello.items())[:50]:
            if isinstance(value, list):
                value = ",".join(str(v) for v in value[:50])  # noqa: PLW2901
            if isinstance(value, Value):
                said = _line(value, TEXT_LENGTH) if isinstance(value, str) else _value(value)
                self.hello[_line(key, NAME_LENGTH)] = said
        sent = self.hello.get("time")
        if isinstance(sent, int | float) and not isinstance(sent, bool):
            self.hello["clock_offset"] = sent - now

    def _fault(self, what: str) -> None:
        if len(self.faults) < FAULTS:
            self.faults.append(what)


def _parse(data: bytes) -> Any:
    try:
        return from_json(data)
    except ValueError:
        # The fast parser refuses half surrogates, which a tool's output may have, and all but UTF-8.
        return json.loads(data)


def _to_record(name: str, frame: Mapping[str, Any]) -> CheckRecord:
    """A record of this check in any case: what cannot be used makes it an ERROR that says so."""
    sent = frame.get("status")
    status = _FROM_NODE.get(sent) if isinstance(sent, str) else None
    evidence = frame.get("evidence")
    lines = evidence[:LINES] if isinstance(evidence, list) else ()
    detail = _line(frame.get("detail", ""), LINE_LENGTH)
    measures: tuple[Measure, ...] = ()
    if status is None:
        status, detail = Status.ERROR, "the node sent an unknown status"
    elif status is Status.ANSWERED:
        try:
            measures = _to_measures(frame.get("measures"))
        except _Unusable as unusable:
            status, detail = Status.ERROR, str(unusable)
    return CheckRecord(
        name,
        status,
        _seconds(frame.get("seconds")),
        measures,
        tuple(_line(line, LINE_LENGTH) for line in lines),
        detail,
    )


class _Unusable(ValueError):
    """Measures that are not what an agent sends."""


def _to_measures(sent: object) -> tuple[Measure, ...]:
    if not isinstance(sent, list) or len(sent) > MEASURES:
        raise _Unusable("the node sent no list of measures, or too long a one")
    found = []
    for item in sent:
        if type(item) is not list or len(item) != 3:
            raise _Unusable("the node sent a malformed measure")
        metric, device, value = item
        kind = type(value)
        if type(metric) is not str or type(device) not in _DEVICE_KINDS or kind not in _VALUE_KINDS:
            raise _Unusable("the node sent a malformed measure")
        measure = _KNOWN.get((metric, device, value, kind))
        found.append(_to_measure(metric, device, value) if measure is None else measure)
    if not found:
        raise _Unusable("the node sent an answer without a measure")
    return tuple(found)


_DEVICE_KINDS = frozenset({str, type(None)})
_VALUE_KINDS = frozenset({bool, int, float, str, type(None)})
"""Exact types, as JSON gives no others."""

_KNOWN: dict[tuple[str, str | None, Value, type], Measure] = {}
"""What nodes sent -> the measure made of it. Nodes of one kind say mostly the same (no errors on device 3,
such a driver): it need be made, and kept, only once. The type is in the key because 1 == True == 1.0."""

_KNOWN_MOST, _KNOWN_LENGTH = 1 << 14, 200
"""A node that sends ever new or long text must not fill this machine's memory."""


def _to_measure(metric: str, device: str | None, value: Value) -> Measure:
    if isinstance(value, float) and not math.isfinite(value):
        raise _Unusable(f"{_line(metric, 80)}: not a finite number")
    shown = None if device is None else _line(device, NAME_LENGTH)
    measure = Measure(_line(metric, NAME_LENGTH), shown, _value(value))
    if len(metric) + len(device or "") + (len(value) if isinstance(value, str) else 0) <= _KNOWN_LENGTH:
        if len(_KNOWN) >= _KNOWN_MOST:
            _KNOWN.clear()
        _KNOWN[metric, device, value, type(value)] = measure
    return measure


def _value(value: Value) -> Value:
    if isinstance(value, str):
        return _text(value, TEXT_LENGTH)
    if isinstance(value, int) and not -_INT_LIMIT <= value < _INT_LIMIT:
        try:
            return float(value)
        except OverflowError:
            return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return 0.0


def _line(value: object, length: int) -> str:
    """As `_text`, and in one line: a node must not forge a second one in what is shown of it."""
    if isinstance(value, str) and not value.isprintable():
        value = " ".join(value.splitlines())
    return _text(value, length)


def _text(value: object, length: int) -> str:
    """Text that may be shown and stored: no control characters (terminals obey them), no lone surrogates."""
    if not isinstance(value, str):
        return ""
    if len(value) > length:
        value = value[: length - 3] + "..."
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)
