"""Read the dumps of torch's flight recorder, one a rank, pickle or JSON.

The format is that of ``torch/csrc/distributed/c10d/FlightRecorder.hpp`` (dump versions 2.0 to 2.10).
Quirks that decide a diagnosis are met here, so that what follows sees one model:

- Gloo has no device events: its entries stay ``scheduled`` for ever and only ``retired`` says that they
  ended; it does not record point-to-point operations, and its ``pg_config`` does not name the members.
- NCCL records the parts of a coalesced operation without a state of their own; a later ``coalesced`` entry
  with the same sequence number has it.
- A dump of active operations alone lacks what was completed; ``pg_status`` then tells how far a group was.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recovery.diagnose.plainpickle import MAX_BYTES, NotPlainError, loads
from recovery.diagnose.recording import COMPLETED_KEPT, Dump, Entry, Exchange, Group, Progress, State
from recovery.diagnose.stacks import Frame

_MOST_RANKS = 1_000_000


class DumpError(ValueError):
    """The bytes are not a flight-recorder dump, or a broken one."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not read, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dumps:
    """What a directory of dumps holds."""

    by_rank: Mapping[int, Dump]
    skipped: tuple[Skipped, ...]


def read_dumps(paths: Iterable[Path]) -> Dumps:
    """Read files, and the files right in directories. The rank is the number that ends a file's name.

    What cannot be read, is broken, too large or something else is listed in ``skipped``; nothing raises.
    """
    by_rank: dict[int, Dump] = {}
    skipped: list[Skipped] = []
    for path in _files(paths, skipped):
        number = _RANK.search(path.name)
        if number is None:
            skipped.append(Skipped(str(path), "the name does not end in a rank"))
            continue
        rank = int(number[1])
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            dump = parse_dump(data, rank)
        except OSError as error:
            skipped.append(Skipped(str(path), error.strerror or str(error)))
        except DumpError as error:
            skipped.append(Skipped(str(path), str(error)))
        else:
            if rank in by_rank:
                skipped.append(Skipped(str(path), f"another dump of rank {rank} was read before it"))
            else:
                by_rank[rank] = dump
    return Dumps(by_rank, tuple(skipped))


_RANK = re.compile(r"(\d{1,7})(?:\.(?:json|pkl|pickle|bin|dump))?$")


def _files(paths: Iterable[Path], skipped: list[Skipped]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        try:
            found = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        except OSError as error:
            skipped.append(Skipped(str(path), error.strerror or str(error)))
            continue
        files += found
    return files


def parse_dump(data: bytes, rank: int) -> Dump:
    """The dump of ``rank`` in ``data``. Raises DumpError when it is not one."""
    read = _plain(data)
    if not isinstance(read, dict) or "version" not in read or "pg_config" not in read:
        raise DumpError("not a flight-recorder dump: no version and groups")
    # The JSON form leaves the list out when nothing was recorded.
    listed = read.get("entries", [])
    raw = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    if not isinstance(listed, list) or len(raw) != len(listed):
        raise DumpError("its entries are not a list of records")
    groups = _groups(read.get("pg_config"), raw)
    states = _states(raw)
    kept = _kept(states)
    entries = tuple(_entry(raw[i], states[i]) for i in kept)
    return Dump(
        rank=rank,
        version=str(read.get("version", "")),
        groups=groups,
        entries=entries,
        progress=_progress(raw, states, read.get("pg_status"), groups),
        exchanges=_exchanges(raw, states),
        whole=bool(raw) and _int(raw[0].get("record_id")) == 0,
    )


def _plain(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise DumpError(f"more than {MAX_BYTES} bytes")
    if data[:1] == b"\x80":
        try:
            return loads(data)
        except NotPlainError as error:
            raise DumpError(f"refused: {error}") from None
    if data.lstrip()[:1] == b"{":
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise DumpError("broken JSON") from None
    raise DumpError("empty file" if not data else "neither a pickle nor JSON")


# --- one entry -----------------------------------------------------------------------------------------

_NAME = re.compile(r"(?:(\w+):)?(\S+)(?: (\d+)(->|<-)(\d+))?")


def _entry(raw: Mapping[str, Any], state: State) -> Entry:
    group = _pair(raw.get("process_group"))
    backend, op, peers = _operation(raw)
    return Entry(
        record=_int(raw.get("record_id")),
        group=group[0],
        op=op,
        backend=backend,
        state=state,
        retired=raw.get("retired") is True,
        collective_seq=_int(raw.get("collective_seq_id")),
        p2p_seq=_int(raw.get("p2p_seq_id")),
        op_id=_int(raw.get("op_id")),
        is_p2p=_is_p2p(raw),
        peers=peers,
        input_sizes=_sizes(raw.get("input_sizes")),
        output_sizes=_sizes(raw.get("output_sizes")),
        input_dtypes=_texts(raw.get("input_dtypes")),
        output_dtypes=_texts(raw.get("output_dtypes")),
        created_ns=_int(raw.get("time_created_ns")),
        started_ns=_int_or_none(raw.get("time_discovered_started_ns")),
        completed_ns=_int_or_none(raw.get("time_discovered_completed_ns")),
        timeout_ms=_int_or_none(raw.get("timeout_ms")),
        frames=_frames(raw.get("frames")),
    )


def _operation(raw: Mapping[str, Any]) -> tuple[str, str, tuple[int, int] | None]:
    """``nccl:recv 3<-0`` -> ("nccl", "recv", (0, 3)): always (source, destination)."""
    name = raw.get("profiling_name")
    seen = _NAME.match(name) if isinstance(name, str) else None
    if seen is None:
        return "", "?", None
    if seen[4] is None:
        return seen[1] or "", seen[2], None
    a, b = int(seen[3]), int(seen[5])
    return seen[1] or "", seen[2], (a, b) if seen[4] == "->" else (b, a)


def _states(raw: list[dict[str, Any]]) -> list[State]:
    states = []
    coalesced: dict[tuple[str, bool, int], State] = {}
    for entry in raw:
        name = entry.get("profiling_name")
        text = name if isinstance(name, str) else ""
        state = _STATES.get(str(entry.get("state")), State.SCHEDULED)
        if text.startswith("gloo:") and entry.get("retired") is True:
            state = State.COMPLETED
        if text.endswith(":coalesced"):
            coalesced[_launch(entry)] = state
        states.append(state)
    if coalesced:
        states = [coalesced.get(_launch(e), s) for e, s in zip(raw, states, strict=True)]
    return states


_STATES = {s.value: s for s in State}


def _launch(entry: Mapping[str, Any]) -> tuple[str, bool, int]:
    p2p = _is_p2p(entry)
    return (
        _pair(entry.get("process_group"))[0],
        p2p,
        _int(entry.get("p2p_seq_id" if p2p else "collective_seq_id")),
    )


def _is_p2p(raw: Mapping[str, Any]) -> bool:
    flag = raw.get("is_p2p")
    return flag if isinstance(flag, bool) else _operation(raw)[2] is not None


def _kept(states: list[State]) -> list[int]:
    completed = [i for i, state in enumerate(states) if state is State.COMPLETED]
    dropped = set(completed[: max(len(completed) - COMPLETED_KEPT, 0)])
    return [i for i in range(len(states)) if i not in dropped]


# --- groups and how far each came ----------------------------------------------------------------------


def _groups(config: Any, raw: list[dict[str, Any]]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(key, str) and key and isinstance(value, dict):
            groups[key] = Group(key, str(value.get("desc", "")), _ranks(value.get("ranks")))
    for entry in raw:
        name, description = _pair(entry.get("process_group"))
        if name not in groups:
            groups[name] = Group(name, description, None)
        elif not groups[name].description and description:
            groups[name] = replace(groups[name], description=description)
    return groups


def _ranks(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str):
        value = [int(n) for n in re.findall(r"\d{1,7}", value)]
    if not isinstance(value, list) or not value or len(value) > _MOST_RANKS:
        return None
    return tuple(v for v in value if type(v) is int)


def _progress(
    raw: list[dict[str, Any]], states: list[State], status: Any, groups: Mapping[str, Group]
) -> dict[str, Progress]:
    """Highest collective enqueued in a group, and the highest before the first unfinished one."""
    enqueued: dict[str, int] = {}
    unfinished: dict[str, int] = {}
    mixed: set[str] = set()
    numbers: dict[str, str] = {}
    for entry, state in zip(raw, states, strict=True):
        name = _pair(entry.get("process_group"))[0]
        numbers[str(entry.get("pg_id"))] = name
        if _is_p2p(entry) or str(entry.get("profiling_name")).startswith("gloo:"):
            # pg_status counts point-to-point operations too, so it is no collective sequence number here.
            mixed.add(name)
        if _is_p2p(entry):
            continue
        seq = _int(entry.get("collective_seq_id"))
        enqueued[name] = max(enqueued.get(name, 0), seq)
        if state is not State.COMPLETED:
            unfinished[name] = min(unfinished.get(name, seq), seq)
    for name, last in _last_enqueued(status, numbers, groups).items():
        if name not in mixed:
            enqueued[name] = max(enqueued.get(name, 0), last)
    return {n: Progress(last, unfinished.get(n, last + 1) - 1) for n, last in enqueued.items()}


def _last_enqueued(status: Any, numbers: Mapping[str, str], groups: Mapping[str, Group]) -> dict[str, int]:
    """``pg_status`` is keyed by the order in which this process made its groups, ``pg_config`` by name.

    Groups that have entries tell their number. For the rest the two orders are laid side by side, but only
    when names are numbers too, there are as many of both, and every pair already known fits.
    """
    if not isinstance(status, dict):
        return {}
    names = dict(numbers)
    if len(status) == len(groups) and all(n.isdigit() for n in [*groups, *map(str, status)]):
        paired = dict(zip(sorted(map(str, status), key=int), sorted(groups, key=int), strict=True))
        if all(paired.get(number) == name for number, name in numbers.items()):
            names = paired
    return {
        names[str(number)]: _int(value.get("last_enqueued_collective"))
        for number, value in status.items()
        if str(number) in names and isinstance(value, dict)
    }


def _exchanges(raw: list[dict[str, Any]], states: list[State]) -> dict[tuple[str, str, int, int], Exchange]:
    found: dict[tuple[str, str, int, int], Exchange] = {}
    for entry, state in zip(raw, states, strict=True):
        if not _is_p2p(entry):
            continue
        _, op, peers = _operation(entry)
        if peers is None:
            continue
        key = (_pair(entry.get("process_group"))[0], op, *peers)
        had = found.get(key, Exchange(0, 0))
        newest = had.last_completed_created_ns
        if state is State.COMPLETED:
            newest = max(newest, _int(entry.get("time_created_ns")))
        found[key] = Exchange(had.seen + 1, newest)
    return found


# --- values of any shape -------------------------------------------------------------------------------


def _int(value: Any) -> int:
    """JSON dumps write the counters of ``pg_status`` as strings."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value) else 0


def _int_or_none(value: Any) -> int | None:
    return value if type(value) is int else None


def _pair(value: Any) -> tuple[str, str]:
    """``process_group`` is (name, description); it was the bare name before dump version 2.0."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return str(value[0]), str(value[1])
    return (value, "") if isinstance(value, str) else ("", "")


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, (list, tuple)) else ()


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    return tuple(tuple(n for n in v if type(n) is int) for v in value if isinstance(v, (list, tuple)))


def _frames(value: Any) -> tuple[Frame, ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    return tuple(
        Frame(str(f.get("name", "?"))[:200], str(f.get("filename", "?"))[:400], _int(f.get("line")))
        for f in value[:64]
        if isinstance(f, dict)
    )
