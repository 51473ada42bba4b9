"""Reports as files and as XML."""

from __future__ import annotations

import io
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ltpctl.console import Output
from ltpctl.progress import NodeProgress
from ltpctl.reports.files import write_whole
from ltpctl.reports.folding import groups
from ltpctl.reports.junit import junit
from probes.model import Finding, Outcome
from probes.verdict import fold

NOT_XML = "\x00 \x1b[2J \x9b \ud800 \ufffe \uffff <b> & ü \U0001f600"


def test_whatever_a_node_or_a_server_says_junit_stays_readable_xml(tmp_path: Path) -> None:
    finding = Finding("site.x", Outcome.FAIL, NOT_XML, action=NOT_XML, evidence=(NOT_XML,))
    file = tmp_path / "report.xml"
    write_whole(file, junit([fold("n1", {"site.x": Outcome.FAIL}, [finding])]))
    (failure,) = ET.parse(file).getroot().iter("failure")
    message = failure.get("message")
    assert message is not None
    assert "<b> & ü \U0001f600" in message
    assert "\\ufffe" in message
    assert "\x1b" not in message


def test_a_link_that_somebody_put_in_the_way_of_a_report_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f".report.html.{os.getpid()}").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "report.html", "<p>")
    assert precious.read_text() == "mine"


def test_a_report_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "old").write_text("x")
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "report.html", "<p>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_a_node_says_cannot_write_lines_of_its_own_among_the_findings() -> None:
    said = "driver is 1\nnode02  healthy\n-> run this, expected == 2"
    finding = Finding("site.x", Outcome.FAIL, said, action="Update.")
    (group,) = groups([fold("n1", {"site.x": Outcome.FAIL}, [finding])])
    (line,) = group.lines
    assert line.text == "driver is 1 node02  healthy -> run this, expected == 2"
    stderr = io.StringIO()
    with NodeProgress(Output(stderr=stderr), 1) as progress:
        progress.done("n1", "unhealthy", [("site.x", said)])
    assert len(stderr.getvalue().splitlines()) == 1
