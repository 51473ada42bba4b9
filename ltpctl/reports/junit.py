"""Validation results as JUnit XML, for CI systems: a suite a node, a case a check."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from ltpctl import console
from probes.model import Finding, NodeVerdict, Outcome

_ELEMENT = {
    Outcome.FAIL: "failure",
    Outcome.UNKNOWN: "error",
    Outcome.TIMEOUT: "error",
    Outcome.UNSUPPORTED: "skipped",
    Outcome.NOT_APPLICABLE: "skipped",
}
"""A warning stays a passed case with its text in system-out: JUnit knows no warnings."""


def junit(verdicts: Sequence[NodeVerdict]) -> str:
    """The document. Characters that XML cannot carry, of whatever text, are spelled out."""
    root = ET.Element("testsuites", name="ltpctl validate nodes")
    for verdict in verdicts:
        suite = ET.SubElement(root, "testsuite", name=clean(verdict.node), time=f"{verdict.seconds:.3f}")
        counts = {"tests": 0, "failure": 0, "error": 0, "skipped": 0}
        by_check: dict[str, list[Finding]] = {}
        for finding in verdict.findings:
            by_check.setdefault(finding.check, []).append(finding)
        for check in (*verdict.checks, *(c for c in by_check if c not in verdict.checks)):
            found = by_check.get(check, [])
            outcome = verdict.checks.get(check, found[0].outcome if found else Outcome.PASS)
            counts["tests"] += 1
            case = ET.SubElement(suite, "testcase", classname=clean(verdict.node), name=check)
            text = "\n".join(_text(finding) for finding in found)
            if element := _ELEMENT.get(outcome):
                counts[element] += 1
                message = found[0].message if found else str(outcome)
                ET.SubElement(case, element, message=clean(message)).text = clean(text)
            elif text:
                ET.SubElement(case, "system-out").text = clean(text)
        suite.set("tests", str(counts["tests"]))
        suite.set("failures", str(counts["failure"]))
        suite.set("errors", str(counts["error"]))
        suite.set("skipped", str(counts["skipped"]))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def clean(text: str) -> str:
    """Safe on a terminal, and within the characters of XML 1.0 (section 2.2)."""
    return _NOT_XML.sub(lambda m: f"\\u{ord(m[0]):04x}", console.clean(text))


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(finding: Finding) -> str:
    lines = [f"{finding.outcome}: {finding.message}"]
    if finding.action:
        lines.append(f"do: {finding.action}")
    return "\n".join([*lines, *finding.evidence])
