"""The document that others read, the ledger's rows, and what changed between two runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from inventory.ledger.records import VerdictRow
from probes.difference import diff
from probes.fleetwide import Member, Note
from probes.model import Finding, NodeVerdict, Outcome, Verdict
from probes.plan import make_plan
from probes.profiles import Profiles, RuleBook
from probes.report import (
    finding_json,
    measurement_rows,
    schema,
    to_json,
    verdict_from_row,
    verdict_row,
)
from probes.validate import ValidationResult
from probes.verdict import fold
from tests.probes.catalogues import catalogue

ECC = Finding(
    "accelerator.ecc",
    Outcome.FAIL,
    "uncorrectable is 3 errors, expected == 0",
    metric="uncorrectable",
    device="0",
    value=3,
    unit="errors",
    limit="== 0",
    source="sku:h100",
    reference="data sheet",
    action="Reset.",
    evidence=("a line", "another"),
)
SLOW = replace(ECC, check="accelerator.gemm", outcome=Outcome.WARN, value=math.nan, source="peers")
SPARED = Finding("accelerator.gemm", Outcome.NOT_APPLICABLE, "not run: in use")


def node(name: str, *findings: Finding) -> NodeVerdict:
    outcomes = {"accelerator.ecc": Outcome.PASS, "accelerator.gemm": Outcome.PASS}
    return fold(name, outcomes, findings, sku="h100")


@pytest.fixture
def result(tmp_path: Path) -> ValidationResult:
    plan = make_plan(catalogue(tmp_path), "standard")
    verdicts = (node("n1", ECC, SLOW), node("n2"), node("n3", SPARED))
    rates = [("0", 612.5), ("1", math.nan), ("2", "x"), ("3", True)]
    member = Member("n2", "h100", {"accelerator.gemm.bf16": rates})
    return ValidationResult(plan, verdicts, (Note("something", "a.b.c", "h100"),), (member,), 1.7e9, 2.5)


def test_the_document_is_what_its_schema_says(result: ValidationResult) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    document = json.loads(json.dumps(to_json(result), allow_nan=False))
    jsonschema.validate(document, schema())
    assert document["schema"] == "ltpctl/validate/1"
    assert document["summary"] == {"healthy": 2, "degraded": 0, "unhealthy": 1, "unknown": 0}
    assert document["nodes"][0]["findings"][0]["value"] == 3
    assert document["nodes"][0]["findings"][1]["value"] is None
    assert document["nodes"][2]["findings"] == []
    assert document["nodes"][2]["skipped"] == [{"check": "accelerator.gemm", "reason": "not run: in use"}]


@pytest.mark.parametrize("missing", ["schema", "nodes", "summary"])
def test_a_document_without_a_promised_part_is_not_valid(result: ValidationResult, missing: str) -> None:
    document = to_json(result)
    del document[missing]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())


@pytest.mark.parametrize("change", [{"outcome": "pass"}, {"source": "nobody"}, {"check": "Not a name"}])
def test_a_finding_that_says_something_unknown_is_not_valid(result: ValidationResult, change: dict) -> None:
    document = to_json(result)
    document["nodes"][0]["findings"][0].update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())


def test_a_verdict_comes_back_from_its_row(result: ValidationResult) -> None:
    for verdict in (node("n1", ECC), node("n3", SPARED), node("n2")):
        row = verdict_row(verdict)
        stored = replace(row, findings=json.loads(json.dumps(row.findings)), checks=dict(row.checks))
        assert verdict_from_row(stored) == verdict


def test_measurements_are_the_finite_numbers_of_metrics_with_a_baseline(
    result: ValidationResult, tmp_path: Path
) -> None:
    book = RuleBook(catalogue(tmp_path), Profiles({}))
    measured = [(r.node, r.metric, r.device, r.value) for r in measurement_rows(result, book)]
    assert measured == [("n2", "accelerator.gemm.bf16", "0", 612.5)]


def rows(**nodes: list[Finding]) -> list[VerdictRow]:
    return [verdict_row(node(name, *findings)) for name, findings in nodes.items()]


def test_a_difference_names_who_became_worse_who_recovered_and_why() -> None:
    found = diff(rows(a=[], b=[ECC], c=[ECC], old=[]), rows(a=[ECC], b=[], c=[SLOW], new=[]))
    assert [(c.node, c.before, c.after, c.appeared) for c in found.worse] == [
        ("a", Verdict.HEALTHY, Verdict.UNHEALTHY, (ECC,))
    ]
    assert [(c.node, c.gone) for c in found.recovered] == [("b", (ECC,))]
    assert [(c.node, c.after) for c in found.better] == [("c", Verdict.DEGRADED)]
    assert (found.only_before, found.only_after) == (("old",), ("new",))


def test_the_same_verdict_for_another_reason_is_a_change_and_another_value_is_none() -> None:
    other = replace(ECC, device="1")
    found = diff(rows(a=[ECC], b=[ECC]), rows(a=[other], b=[replace(ECC, value=4)]))
    (change,) = found.changed
    assert (change.node, change.appeared, change.gone) == ("a", (other,), (ECC,))


def test_nothing_changed_is_said_so() -> None:
    assert diff(rows(a=[ECC]), rows(a=[ECC])).nothing
    assert not diff(rows(a=[ECC]), rows(a=[])).nothing


def test_a_check_that_the_other_run_did_not_make_neither_appears_nor_goes() -> None:
    (later,) = rows(a=[])
    later = replace(later, checks={"accelerator.gemm": "pass"})
    (change,) = diff(rows(a=[ECC]), [later]).recovered
    assert change.gone == ()


def test_a_finding_of_the_transport_needs_no_check_to_appear() -> None:
    lost = Finding("transport.connect", Outcome.UNKNOWN, "refused")
    (change,) = diff(rows(a=[]), rows(a=[lost])).worse
    assert change.appeared == (lost,)
    assert finding_json(lost)["outcome"] == "unknown"


def unreachable(name: str) -> VerdictRow:
    lost = Finding("transport.connect", Outcome.TIMEOUT, "no answer")
    outcomes = {"accelerator.ecc": Outcome.UNKNOWN, "accelerator.gemm": Outcome.UNKNOWN}
    return verdict_row(fold(name, outcomes, [lost], sku="h100"))


def test_a_bad_node_that_is_lost_is_neither_better_nor_rid_of_its_findings() -> None:
    found = diff(rows(a=[ECC]), [unreachable("a")])
    assert not found.better
    (change,) = found.changed
    assert (change.before, change.after) == (Verdict.UNHEALTHY, Verdict.UNKNOWN)
    assert [finding.check for finding in change.appeared] == ["transport.connect"]
    assert change.gone == ()


def test_a_lost_node_that_answers_again_is_rid_of_the_transport_s_finding() -> None:
    (change,) = diff([unreachable("a")], rows(a=[])).recovered
    assert [finding.check for finding in change.gone] == ["transport.connect"]
