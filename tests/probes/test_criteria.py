"""Absolute limits and the verdict: nothing that is not known ever passes."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory.fleet import Node
from probes.catalogue import load_catalogue
from probes.criteria import judge
from probes.judging import judge_clock, judge_kind, judge_report
from probes.limits import Demand, parse
from probes.model import CheckRecord, Finding, Measure, NodeReport, Outcome, Status, Verdict
from probes.profiles import Kind, Profiles, RuleBook, load_profiles
from probes.verdict import BADNESS, fold
from tests.probes.catalogues import answered, catalogue, profiles, report


@pytest.fixture
def book(tmp_path: Path) -> RuleBook:
    checks = catalogue(tmp_path)
    return RuleBook(checks, profiles(tmp_path, checks))


@pytest.fixture
def plain(book: RuleBook) -> Kind:
    """A node of which nobody has said what it is."""
    return book.kind(Node("n1"))


@pytest.fixture
def h100(book: RuleBook) -> Kind:
    return book.kind(Node("n1", sku="h100"))


ECC = "accelerator.ecc"


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(0, Outcome.PASS), (3, Outcome.FAIL), (None, Outcome.UNKNOWN), (math.nan, Outcome.UNKNOWN)]
    + [(value, Outcome.UNKNOWN) for value in ("[N/A]", "", True, False, math.inf)],
)
def test_a_value_passes_only_when_its_limit_holds_for_certain(
    plain: Kind, value: object, outcome: Outcome
) -> None:
    record = answered(ECC, ("uncorrectable", value, "0"))  # type: ignore[arg-type]
    assert judge(plain.rules, ECC, record).outcome is outcome


def test_a_finding_shows_value_limit_source_action_and_evidence(plain: Kind) -> None:
    (finding,) = judge(
        plain.rules, ECC, answered(ECC, ("uncorrectable", 0, "0"), ("correctable", 12, "0"))
    ).findings
    assert finding == Finding(
        check=ECC,
        outcome=Outcome.WARN,
        message="correctable is 12 errors, expected < 10",
        metric="correctable",
        device="0",
        value=12,
        unit="errors",
        limit="< 10",
        source="default",
        reference="a rule of thumb",
        action="Reset the device.",
        evidence=(f"{ECC} printed this",),
    )


def test_a_text_from_a_node_stays_in_its_place_in_a_message(plain: Kind) -> None:
    forged = "0\nnode002: healthy"
    (finding,) = judge(plain.rules, ECC, answered(ECC, ("uncorrectable", forged, "0"))).findings
    assert finding.message.startswith("uncorrectable is '0\\nnode002: healthy', which cannot be held")
    assert finding.value == forged


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (Status.TIMEOUT, Outcome.TIMEOUT),
        (Status.ERROR, Outcome.UNKNOWN),
        (Status.MISSING, Outcome.UNKNOWN),
        (Status.UNSUPPORTED, Outcome.UNSUPPORTED),
        (Status.NOT_APPLICABLE, Outcome.NOT_APPLICABLE),
    ],
)
def test_a_check_without_an_answer_has_an_outcome_of_its_own_kind(
    plain: Kind, status: Status, outcome: Outcome
) -> None:
    judged = judge(plain.rules, ECC, CheckRecord(ECC, status, detail="so it was"))
    assert judged.outcome is outcome
    assert [f.outcome for f in judged.findings] == ([] if outcome is Outcome.NOT_APPLICABLE else [outcome])


def test_a_record_that_never_came_is_unknown(plain: Kind) -> None:
    assert judge(plain.rules, ECC, None).outcome is Outcome.UNKNOWN


def test_an_answer_with_none_of_the_judged_values_is_unknown(plain: Kind) -> None:
    judged = judge(plain.rules, ECC, answered(ECC, ("mode", "enabled", "0")))
    assert judged.outcome is Outcome.UNKNOWN
    assert "uncorrectable" in judged.findings[0].message


def test_an_answer_without_any_value_is_unknown_even_without_limits(plain: Kind) -> None:
    assert judge(plain.rules, "accelerator.gemm", answered("accelerator.gemm")).outcome is Outcome.UNKNOWN


def test_a_default_limit_on_a_value_that_the_node_does_not_have_is_ignored(plain: Kind) -> None:
    assert judge(plain.rules, ECC, answered(ECC, ("uncorrectable", 0, "0"))).outcome is Outcome.PASS


def test_a_value_that_the_sku_demands_and_the_check_did_not_report_is_unknown(h100: Kind) -> None:
    judged = judge(h100.rules, ECC, answered(ECC, ("uncorrectable", 0, "0")))
    assert judged.outcome is Outcome.UNKNOWN
    (finding,) = judged.findings
    assert (finding.metric, finding.source, finding.limit) == ("mode", "sku:h100", "== enabled")


def test_a_demanded_value_that_one_device_lacks_is_unknown_for_that_device(h100: Kind) -> None:
    full = [("uncorrectable", 0, str(d)) for d in range(8)]
    judged = judge(h100.rules, ECC, answered(ECC, *full, *(("mode", "enabled", str(d)) for d in range(7))))
    assert [(f.outcome, f.device) for f in judged.findings] == [(Outcome.UNKNOWN, "7")]


def test_devices_of_another_kind_do_not_lack_a_demanded_value(h100: Kind) -> None:
    record = answered(ECC, ("mode", "enabled", "0"), ("uncorrectable", 0, "0:link3"))
    assert judge(h100.rules, ECC, record).outcome is Outcome.PASS


def test_devices_that_the_sku_has_and_the_node_does_not_show_are_unknown_not_inapplicable(h100: Kind) -> None:
    judged = judge(h100.rules, ECC, CheckRecord(ECC, Status.NOT_APPLICABLE))
    assert judged.outcome is Outcome.UNKNOWN
    assert "sku:h100" in judged.findings[0].message


def test_the_limit_of_the_sku_replaces_the_catalogues_and_the_inventorys_the_skus(book: RuleBook) -> None:
    def limits(node: Node) -> tuple[str, str]:
        rule = book.kind(node).rules.rule("accelerator.gemm", "bf16")
        assert rule is not None
        return (str(rule.demand.fail), rule.demand.source) if rule.demand else ("", "")

    assert limits(Node("n")) == ("", "")
    assert limits(Node("n", sku="H100")) == (">= 600", "sku:h100")
    own = {"limits": {"accelerator.gemm.bf16": ">= 700"}}
    assert limits(Node("n", sku="hgx", vars=own)) == (">= 700", "inventory")


def test_a_check_with_a_limit_of_the_inventory_is_essential_on_that_node(book: RuleBook) -> None:
    node = Node("n", vars={"limits": {"accelerator.gemm.bf16": {"warn": ">= 1"}}})
    assert "accelerator.gemm" in book.kind(node).essential
    assert "accelerator.gemm" not in book.kind(Node("m")).essential


def test_the_failure_of_the_whole_node_is_told_once_and_leaves_every_check_unknown(plain: Kind) -> None:
    failed = NodeReport("n1", None, {}, failure="no answer", failure_phase="auth", failure_ending="timeout")
    judgement = judge_report(failed, plain, plain.rules.checks)
    assert set(judgement.outcomes) == set(plain.rules.checks)
    assert set(judgement.outcomes.values()) == {Outcome.UNKNOWN}
    assert [(f.check, f.outcome, f.message) for f in judgement.findings] == [
        ("transport.auth", Outcome.TIMEOUT, "no answer")
    ]


def test_what_a_node_said_before_it_failed_still_counts(plain: Kind) -> None:
    records = {ECC: answered(ECC, ("uncorrectable", 3, "0"))}
    broken = NodeReport("n1", None, records, failure="lost", failure_phase="command")
    judgement = judge_report(broken, plain, plain.rules.checks)
    verdict = fold("n1", judgement.outcomes, judgement.findings)
    assert verdict.verdict is Verdict.UNHEALTHY
    assert [f.check for f in verdict.findings] == [ECC, "transport.command"]


def test_a_check_that_was_left_out_is_shown_and_does_not_count(plain: Kind) -> None:
    records = [answered(ECC, ("uncorrectable", 0, "0"))]
    judgement = judge_report(
        report(records), plain, [ECC, "accelerator.gemm"], {"accelerator.gemm": "in use"}
    )
    verdict = fold("n1", judgement.outcomes, judgement.findings)
    assert verdict.verdict is Verdict.HEALTHY
    assert verdict.checks["accelerator.gemm"] is Outcome.NOT_APPLICABLE
    assert [f.message for f in verdict.findings] == ["not run: in use"]


@pytest.mark.parametrize(
    ("offset", "outcome"),
    [(0, None), (0.9, None), (-3, Outcome.WARN), (6, Outcome.FAIL), (-9000, Outcome.FAIL)],
)
def test_a_clock_that_is_off_is_a_finding(offset: float, outcome: Outcome | None) -> None:
    assert [f.outcome for f in judge_clock(offset)] == ([outcome] if outcome else [])


def test_accelerators_that_no_profile_describes_are_told(book: RuleBook) -> None:
    assert judge_kind(book.kind(Node("n"), ["10de:2330"])) == []
    (finding,) = judge_kind(book.kind(Node("n"), ["1abc:0001"]))
    # A machine that nobody described must not read as healthy without a word.
    assert finding.outcome is Outcome.WARN
    assert "1abc:0001" in finding.message


OUTCOMES = st.sampled_from(list(Outcome))


@given(st.dictionaries(st.sampled_from("abcdef"), OUTCOMES), OUTCOMES, st.sampled_from("abcdefg"))
def test_a_further_finding_never_makes_a_verdict_better(
    outcomes: dict[str, Outcome], outcome: Outcome, check: str
) -> None:
    outcomes = {**outcomes, "answered": Outcome.PASS}
    before = fold("n", outcomes, ())
    after = fold("n", outcomes, [Finding(check, outcome, "")])
    assert BADNESS[after.verdict] >= BADNESS[before.verdict]


@given(st.dictionaries(st.sampled_from("abcdef"), OUTCOMES, min_size=1))
def test_a_verdict_is_what_its_worst_outcome_allows(outcomes: dict[str, Outcome]) -> None:
    found = set(outcomes.values())
    verdict = fold("n", outcomes, ()).verdict
    if Outcome.FAIL in found:
        assert verdict is Verdict.UNHEALTHY
    elif found & {Outcome.UNKNOWN, Outcome.TIMEOUT}:
        assert verdict is Verdict.UNKNOWN
    elif Outcome.WARN in found:
        assert verdict is Verdict.DEGRADED
    else:
        assert verdict is (Verdict.HEALTHY if Outcome.PASS in found else Verdict.UNKNOWN)


def test_a_node_of_which_nothing_was_answered_is_not_healthy() -> None:
    assert fold("n", {}, ()).verdict is Verdict.UNKNOWN
    assert fold("n", {"a": Outcome.NOT_APPLICABLE, "b": Outcome.UNSUPPORTED}, ()).verdict is Verdict.UNKNOWN


@given(st.permutations([(o, d) for o in Outcome for d in ("10", "9")]))
def test_findings_are_in_one_order_however_they_came(order: list[tuple[Outcome, str]]) -> None:
    verdict = fold("n", {}, [Finding("a.b", o, "", device=d) for o, d in order])
    shown = [(f.outcome, f.device) for f in verdict.findings]
    assert shown[0] == (Outcome.FAIL, "9")
    assert shown == sorted(shown, key=shown.index)
    assert [o for o, d in shown if d == "9"] == [o for o, d in shown if d == "10"]
    assert verdict == fold("n", {}, [Finding("a.b", o, "", device=d) for d in ("9", "10") for o in Outcome])


def test_judging_a_node_of_sixty_checks_takes_less_than_two_milliseconds() -> None:
    checks = load_catalogue()
    book = RuleBook(checks, load_profiles(checks))
    kind = book.kind(Node("n", sku="h100"))
    chosen = list(checks)[:60]
    records = {}
    for check in chosen:
        made = []
        for metric in check.spec.metrics:
            demand = check.demands.get(metric)
            value = (
                0
                if demand is None or demand.fail is None or demand.fail.holds(0)
                else demand.fail.operands[0]
            )
            made += [Measure(metric, str(d), value) for d in range(4)]
        records[check.name] = CheckRecord(check.name, Status.ANSWERED, 0.0, tuple(made[:4]))
    assert sum(len(r.measures) for r in records.values()) >= 200
    whole = NodeReport("n", kind.sku, records)
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        for _ in range(20):
            judgement = judge_report(whole, kind, records)
            fold("n", judgement.outcomes, judgement.findings)
        best = min(best, (time.process_time() - start) / 20)
    assert best < 0.002


def test_a_demand_of_an_unknown_metric_has_no_rule(tmp_path: Path) -> None:
    checks = catalogue(tmp_path)
    rules = RuleBook(checks, Profiles({})).kind(Node("n")).rules
    assert rules.rule("accelerator.ecc", "nothing") is None
    assert Demand(parse("== 0"), None, "default").explicit is False
