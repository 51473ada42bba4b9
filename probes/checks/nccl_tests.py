"""nccl-tests and rccl-tests, where a node has them: its own all_reduce_perf, run and read."""

import re
from typing import List, NamedTuple, Optional

from probes.agent.api import Host, Measure, Measures, Unsupported
from probes.checks.torch_devices import expected_devices


def nccl_tests(host: Host) -> Measures:
    """Bus bandwidth that all_reduce_perf reports over all devices of the node, and elements it found wrong.

    params: ``program``; ``begin`` and ``end``, its message sizes; ``devices`` (0: all that torch or the bus
    shows); ``limit`` in seconds.
    """
    program = str(host.params.get("program", "all_reduce_perf"))
    if host.which(program) is None:
        raise Unsupported("%s is not installed" % program)
    devices = int(host.params.get("devices") or 0) or expected_devices(host)
    if devices < 1:
        raise Unsupported("no accelerator on this node")
    argv = [
        program,
        "-b",
        str(host.params.get("begin", "8M")),
        "-e",
        str(host.params.get("end", "1G")),
        "-f",
        "2",
    ]
    argv += ["-g", str(devices), "-c", "1"]
    # A count of wrong elements makes it end with another status than 0: its table then still says where.
    ran = host.run(argv, timeout=float(host.params.get("limit", 120.0)), ok=())
    try:
        result = parse(ran.out)
    except ValueError:
        words = (ran.err.strip() or ran.out.strip()).splitlines()[-1:] or ["nothing"]
        raise ValueError(
            "%s ended with status %d and said: %s" % (program, ran.code, words[0][:300])
        ) from None
    yield Measure("wrong_elements", result.wrong)
    yield Measure("out_of_bounds", result.out_of_bounds)
    yield Measure("average_bus_gb_s", result.average)
    yield Measure("bus_gb_s", result.rows[-1].bus)
    yield Measure("devices", result.ranks)
    for row in result.rows:
        if row.wrong:
            host.note("%d bytes: %d wrong" % (row.size, row.wrong))
    host.note("largest: %d bytes, %.2f GB/s on the bus" % (result.rows[-1].size, result.rows[-1].bus))


class Row(NamedTuple):
    """One message size: the better of out-of-place and in-place, in GB/s; wrong elements of both."""

    size: int
    bus: float
    wrong: Optional[int]


class Result(NamedTuple):
    ranks: int
    rows: List[Row]
    wrong: Optional[int]
    """None: the run did not validate."""
    out_of_bounds: int
    average: float


def parse(text: str) -> Result:
    """Output of nccl-tests 2.x or rccl-tests. ValueError when the table or its summary is lacking.

    The columns in front of ``time`` differ between versions and operations; the four (time, algbw, busbw,
    error or #wrong) that end a line, twice, do not.
    """
    rows = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 11 or not all(re.fullmatch(r"\d+", word) for word in words[:2]):
            continue
        try:
            bus = max(float(words[-6]), float(words[-2]))
        except ValueError:
            continue
        rows.append(Row(int(words[0]), bus, _wrong(words[-5], words[-1])))
    average = re.search(r"^# Avg bus bandwidth\s*:\s*([\d.]+)", text, re.MULTILINE)
    bounds = re.search(r"^# Out of bounds values\s*:\s*(\d+)", text, re.MULTILINE)
    if not rows or not average or not bounds:
        raise ValueError("no table and summary of nccl-tests")
    counted = [row.wrong for row in rows if row.wrong is not None]
    return Result(
        ranks=len(re.findall(r"^#\s+Rank\s+\d+ ", text, re.MULTILINE)),
        rows=rows,
        wrong=sum(counted) if counted else None,
        out_of_bounds=int(bounds.group(1)),
        average=float(average.group(1)),
    )


def _wrong(*words: str) -> Optional[int]:
    """Versions before 2.12 print the largest error as a float ("0e+00") where later ones count wrong
    elements."""
    if "N/A" in words:
        return None
    return sum(int(float(word) > 0) if "e" in word or "." in word else int(word) for word in words)
