"""From a report's values to its page."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

from recovery.accounting import Account, AttemptTime, Bucket, LostTime, document
from recovery.accounting.account import NS
from recovery.accounting.summary import TITLES, duration, percent
from recovery.jobreport.charts import HEIGHT, WIDTH, Bar, bars, chart
from recovery.jobreport.report import Happening, JobReport, NodeLine, verdict

MOST_ATTEMPTS = 60
MOST_HAPPENINGS = 200
MOST_EVIDENCE = 20
MOST_DATA = 1000
"""Faults, attempts and nodes, each, in the JSON behind the page."""
LONGEST = 600
"""Characters of one text from a log."""

T = TypeVar("T")
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class AttemptRow:
    attempt: AttemptTime
    label: str
    bars: tuple[Bar, ...]


def render(report: JobReport) -> str:
    """One self-contained page: no script, nothing fetched, every text escaped, its size bounded."""
    environment = Environment(
        loader=PackageLoader("recovery.jobreport"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clean": clean,
        "duration": lambda ns: duration(ns / NS),
        "percent": percent,
        "moment": moment,
        "counted": lambda number: f"{number:,.0f}",
    }
    account = report.account
    colour, sentence = verdict(account)
    attempts, hidden_attempts = _ends(account.attempts, MOST_ATTEMPTS)
    happenings, hidden_happenings = _ends(report.happenings, MOST_HAPPENINGS)
    return environment.get_template("page.html.j2").render(
        report=report,
        account=account,
        colour=colour,
        sentence=sentence,
        whole=bars(report.spans, account.submitted, account.until),
        attempts=[_row(report, one) for one in attempts],
        hidden_attempts=hidden_attempts,
        fault_marks=_marks(account),
        times=_times(account),
        buckets=[(bucket, TITLES[bucket], ns) for bucket, ns in account.buckets.items() if ns],
        titles=TITLES,
        lost=account.lost,
        lost_buckets=_used(account.lost),
        charts=[
            ("Loss", chart(report.stretches, "loss", from_zero=False)),
            (
                "Throughput, tokens/s" if report.tokens_known else "Throughput, steps/s",
                chart(report.stretches, "rate", from_zero=True),
            ),
        ],
        happenings=happenings,
        hidden_happenings=hidden_happenings,
        most_evidence=MOST_EVIDENCE,
        nodes=_nodes(report.nodes),
        data=_data(report),
        width=WIDTH,
        height=HEIGHT,
        Bucket=Bucket,
    )


def clean(text: str) -> str:
    """Text from elsewhere, bounded; what a reader would not see, or is no text at all, is spelled out."""
    if len(text) > LONGEST:
        text = text[:LONGEST] + f" … ({len(text) - LONGEST:,} more characters)"
    return _UNSEEN.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def moment(seconds: float) -> str:
    """Unix time as ``2026-01-02 03:04:05Z``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _row(report: JobReport, one: AttemptTime) -> AttemptRow:
    own = [span for span in report.spans if span.attempt == one.attempt]
    steps = "no step" if one.first_step is None else f"steps {one.first_step:,} – {one.last_step:,}"
    nodes = f"{len(one.nodes)} node{'s' if len(one.nodes) != 1 else ''}, " if one.nodes else ""
    label = f"{nodes}{steps}, {one.outcome.value if one.outcome else 'running'}"
    account = report.account
    return AttemptRow(one, label, bars(own, account.submitted, account.until, WIDTH // 2))


def _marks(account: Account) -> list[tuple[float, str]]:
    """Percent of the timeline and text for each fault, those that fall on the same place told once."""
    marks: dict[int, list[str]] = {}
    for fault in account.faults:
        at = round((fault.began - account.submitted) / max(account.wall, 1) * 500)
        marks.setdefault(min(500, max(0, at)), []).append(f"attempt {fault.attempt}: {fault.cause}")
    return [
        (at / 5, "; ".join(texts[:5]) + (" …" if len(texts) > 5 else ""))
        for at, texts in sorted(marks.items())
    ]


def _times(account: Account) -> list[tuple[float, str]]:
    """Percent of the timeline and time since submission, at round times."""
    wall = account.wall / NS
    if wall <= 0:
        return []
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 21_600, 43_200)
    step = next((s for s in steps if wall / s <= 6), 86_400 * math.ceil(wall / 86_400 / 6))
    return [(k * step / wall * 100, _since(k * step)) for k in range(int(wall / step) + 1)]


def _since(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}" + (f":{rest:02d}" if rest else "")


def _used(lost: Sequence[LostTime]) -> list[Bucket]:
    return [bucket for bucket in Bucket if any(one.buckets.get(bucket) for one in lost)]


def _ends(items: Sequence[T], most: int) -> tuple[list[T], int]:
    """The first quarter and the last three of what may be shown, and how many lie between."""
    if len(items) <= most:
        return list(items), 0
    head = most // 4
    return [*items[:head], *items[head - most :]], len(items) - most


def _nodes(lines: Sequence[NodeLine]) -> list[tuple[str, list[NodeLine], list[NodeLine]]]:
    """By role: the nodes of which there is something to say, and the others, which need no line each."""
    groups: dict[str, tuple[list[NodeLine], list[NodeLine]]] = {}
    for line in lines:
        groups.setdefault(line.role, ([], []))[0 if line.why else 1].append(line)
    return [(role, told[:200], plain) for role, (told, plain) in groups.items()]


def _data(report: JobReport) -> str:
    """What the page shows, as a ``data:`` link's base64 of JSON."""
    account = document(report.account)
    account |= {
        "faults": _ends(cast("list[object]", account["faults"]), MOST_DATA)[0],
        "attempts": _ends(cast("list[object]", account["attempts"]), MOST_DATA)[0],
        "lost": cast("list[object]", account["lost"])[:MOST_DATA],
    }
    shown = {
        "schema": "ltpctl/jobreport/1",
        "name": report.name,
        "time": report.now,
        "account": account,
        "happenings": [_as_data(one) for one in _ends(report.happenings, MOST_HAPPENINGS)[0]],
        "nodes": [
            {
                "node": one.name,
                "role": one.role,
                "attempts": list(one.attempts[-100:]),
                "why": one.why[:LONGEST],
            }
            for one in report.nodes[:MOST_DATA]
        ],
    }
    return base64.b64encode(json.dumps(shown, allow_nan=False).encode()).decode()


def _as_data(one: Happening) -> dict[str, object]:
    return {
        "time": one.time,
        "kind": one.kind,
        "attempt": one.attempt,
        "title": one.title,
        "text": one.text[:LONGEST],
        "nodes": list(one.nodes),
        "evidence": [line[: LONGEST // 3] for line in one.evidence[:MOST_EVIDENCE]],
    }
