"""The report page: whole, self-contained, harmless, and of a size that a browser takes."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings

from recovery.accounting import (
    AttemptEnded,
    AttemptStarted,
    Blame,
    Bucket,
    CheckpointSaved,
    Decided,
    Diagnosed,
    Ended,
    Entry,
    FaultBegan,
    FaultDetected,
    Resumed,
    Span,
    Step,
    Submitted,
)
from recovery.accounting.account import NS
from recovery.jobreport import Stretch, job_report, render
from recovery.jobreport.charts import HEIGHT, WIDTH, bars, chart, nice
from tests.recovery.accounting.histories import journals, plausible

VOID = {"meta", "rect", "line", "path", "br"}
HOSTILE = '</style><script>alert(1)</script>\' onload="x" &lt; {{ 7*7 }} \x1b[31m\u202e\ud800\x00 <img src=http://x/y>'
START = 1_700_000_000.0


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what they are and say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag in {"path", "rect", "line"} and not self._empty()):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def _empty(self) -> bool:
        return (self.get_starttag_text() or "").endswith("/>")


def story(text: str = "rank 3 ended with SIGKILL") -> list[Entry]:
    """One fault with everything said about it, and a restart that takes two steps again."""
    return [
        Submitted(START, text, ("n1", text), ("n9",)),
        AttemptStarted(START + 1, 0, ("n1", text)),
        *[Step(START + 10 + n, 0, n, 1.0, 64, loss=5.0 - n / 10) for n in range(1, 9)],
        CheckpointSaved(START + 16, 0, 6),
        FaultBegan(START + 18.5, 0),
        FaultDetected(START + 19, 0, text, Blame.HARDWARE, (text,), (3,), text, (text, "second line")),
        Diagnosed(START + 20, 0, text, Blame.HARDWARE, (text,), (text,)),
        Decided(START + 21, text, text, 0, (text,), (text,)),
        AttemptEnded(START + 21, 0, reason=text),
        AttemptStarted(START + 22, 1, ("n1", "n9")),
        Resumed(START + 24, 1, 6, checkpoint=text),
        *[Step(START + 20 + n, 1, n, 1.0, 64, loss=5.0 - n / 10) for n in range(7, 12)],
    ]


def data_of(page: Page) -> dict[str, object]:
    (link,) = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert link is not None
    found = json.loads(base64.b64decode(link.removeprefix("data:application/json;base64,")))
    assert isinstance(found, dict)
    return found


def test_the_page_tells_the_fault_its_evidence_and_the_decision() -> None:
    page = Page(render(job_report(story(), START + 40, facts=(("launcher", "ssh"),))))
    for said in ("rank 3 ended with SIGKILL", "second line", "launcher ssh", "detecting", "redone", "n9"):
        assert said in page.text
    assert "training, step 11, after 1 fault, recovered from all" in page.text


def test_the_page_refers_to_nothing_outside_and_has_no_script() -> None:
    text = render(job_report(story(), START + 40))
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag in {"script", "link", "img", "iframe", "object"}]
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"href", "src", "action", "xlink:href"}:
                assert (value or "").startswith("data:application/json;base64,")
    assert "url(" not in text
    assert "@import" not in text


def test_hostile_text_stays_text() -> None:
    text = render(job_report(story(HOSTILE), START + 40, facts=((HOSTILE, HOSTILE),)))
    text.encode()
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag in {"script", "img"}]
    assert not [name for _, attributes in page.elements for name in attributes if name == "onload"]
    assert "<script>alert(1)</script>" in page.text, "shown as it was written"
    assert "{{ 7*7 }}" in page.text
    for unseen in ("\x1b", "\u202e", "\ud800", "\x00"):
        assert unseen not in text


def test_the_data_behind_the_page_are_its_account() -> None:
    found = data_of(Page(render(job_report(story(HOSTILE), START + 40))))
    assert found["schema"] == "ltpctl/jobreport/1"
    assert isinstance(found["account"], dict)
    assert sum(found["account"]["buckets_ns"].values()) == found["account"]["wall_ns"] == 40 * NS


@settings(max_examples=25, deadline=None)
@given(journals())
def test_any_absurd_history_makes_a_valid_page(entries: list[Entry]) -> None:
    Page(render(job_report(entries, START + 1e5)))


@settings(max_examples=15, deadline=None)
@given(plausible())
def test_any_plausible_history_makes_a_valid_page(entries: list[Entry]) -> None:
    Page(render(job_report(entries, START + 1e4)))


def test_a_job_that_has_only_been_submitted_has_a_page() -> None:
    page = Page(render(job_report([Submitted(START, "new")], START)))
    assert "starting, step 0, without a fault" in page.text
    assert "Nothing broke" in page.text


def test_a_million_steps_make_a_page_of_bounded_size_with_the_one_spike_in_it() -> None:
    entries: list[Entry] = [Submitted(START), AttemptStarted(START, 0, ("n1",))]
    for n in range(1, 1_000_001):
        loss = 50.0 if n == 654_321 else 3.0 + (n % 7) / 10
        entries.append(Step(START + n, 0, n, 1.0, 4096, 0.125 if n % 50 == 0 else 0.0, loss))
    text = render(job_report(entries, START + 1_000_001))
    size = len(text)
    assert size < 400_000
    paths = re.findall(r'<path d="([^"]*)"', text)
    highest = min(float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", paths[0]))
    assert highest < HEIGHT * 0.06, "the spike reaches the top of the chart"


def test_thousands_of_faults_make_a_page_of_bounded_size() -> None:
    entries: list[Entry] = [Submitted(START)]
    for attempt in range(600):
        at = START + 60 * attempt
        entries.append(AttemptStarted(at, attempt, tuple(f"node{n:04}" for n in range(8))))
        entries += [Step(at + 10 + n, attempt, attempt + n, 1.0, 64, loss=3.0) for n in range(1, 4)]
        entries.append(FaultDetected(at + 40, attempt, f"cause {attempt}", evidence=("x" * 10_000,) * 100))
        entries.append(Decided(at + 50, "restart", "y" * 10_000))
    size = len(render(job_report([*entries, Ended(START + 1e6)], START)))
    assert size < 6_000_000


def test_each_column_of_the_timeline_shows_what_has_most_of_it() -> None:
    spans = (
        Span(0, 600, Bucket.STARTING, None, "(start)"),
        Span(600, 604, Bucket.DETECTING, 0, "x"),
        Span(604, 1000, Bucket.PRODUCTIVE, 0, ""),
    )
    found = bars(spans, 0, 1000, columns=100)
    assert [(one.bucket, one.x, one.width) for one in found] == [
        (Bucket.STARTING, 0, pytest.approx(600)),
        (Bucket.PRODUCTIVE, 600, pytest.approx(400)),
    ]
    assert [one.bucket for one in bars(spans, 0, 1000, columns=1000)] == [span.bucket for span in spans]


def stretch(attempt: int, first: int, loss: list[float], lossless: tuple[int, ...] = ()) -> Stretch:
    steps = list(range(first, first + len(loss)))
    return Stretch(attempt, steps, loss, [1.0] * len(loss), lossless)


def test_steps_that_a_later_attempt_took_again_are_drawn_apart() -> None:
    plot = chart([stretch(0, 1, [5.0, 4.0, 3.0]), stretch(1, 3, [3.5, 2.0])], "loss", from_zero=False)
    assert plot is not None
    assert [(one.attempt, one.redone) for one in plot.lines] == [(0, True), (0, False), (1, False)]
    assert [tick.label for tick in plot.starts] == ["0", "1"]


def test_a_loss_over_orders_of_magnitude_gets_a_logarithmic_axis() -> None:
    assert chart([stretch(0, 1, [10.0, 1.0])], "loss", from_zero=False).logarithmic is False  # type: ignore[union-attr]
    plot = chart([stretch(0, 1, [1000.0, 1.0, 0.1])], "loss", from_zero=False)
    assert plot is not None
    assert plot.logarithmic
    assert [tick.label for tick in plot.y] == ["0.1", "1", "10", "100", "1k"]


def test_a_loss_that_is_no_number_is_marked_where_it_was() -> None:
    plot = chart([stretch(0, 1, [3.0, math.nan, 2.0], (2,))], "loss", from_zero=False)
    assert plot is not None
    assert [tick.at for tick in plot.gone] == [50]
    assert plot.lines[0].path.count("M") == 2


@pytest.mark.parametrize(
    "losses",
    [
        [1e99, -1e99, 0.0],
        [1e308, -1e308, 0.0],
        [0.0, 0.0],
        [5.0],
        [1e-320, 1.0],
        [-1.0, -1e99],
        [1e99, 1e-99],
    ],
)
def test_extreme_losses_stay_inside_the_box(losses: list[float]) -> None:
    plot = chart([stretch(0, 1, losses)], "loss", from_zero=False)
    assert plot is not None
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.a-z]+?)(?=h|M|L|$)", plot.lines[0].path):
        assert 0 <= float(x) <= WIDTH
        assert -1 <= float(y) <= HEIGHT + 1


def test_ticks_are_round_numbers() -> None:
    assert nice(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice(3, 3, 4) == [3]
