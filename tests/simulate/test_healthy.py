"""Healthy simulated nodes are healthy, by the real catalogue and through the code that judges real nodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from probes.agent.bundle import bundle, check_request, fresh_nonce
from probes.agent.frames import Decoder
from probes.catalogue import load_catalogue
from probes.checks.accelerator import MAKERS
from probes.counters import WATCH_CHECK
from probes.limits import Demand, parse
from probes.model import Outcome, Status, Verdict
from probes.profiles import RuleBook, load_profiles
from probes.simulate.healthy import said_names, value_within
from probes.simulate.node import BadPayload
from tests.simulate.in_process import complaints, fleet, judge, rule_book

SKUS = sorted(rule_book().profiles.by_name)

SEEN_WITHOUT_THE_MAKERS_TOOL = {"count", "tool_responds", "pcie", "aer", "events"}


@pytest.mark.parametrize("level", ["quick", "standard", "comprehensive"])
@pytest.mark.parametrize("sku", SKUS)
async def test_a_healthy_node_of_every_sku_is_judged_healthy_in_every_plan(sku: str, level: str) -> None:
    result = await judge(fleet(sku), level)  # type: ignore[arg-type]
    assert {v.node: complaints(v) for v in result.verdicts if v.verdict is not Verdict.HEALTHY} == {}


@pytest.mark.parametrize("sku", SKUS)
async def test_only_what_a_makers_tool_or_an_undeclared_option_leaves_open_is_not_answered(sku: str) -> None:
    result = await judge(fleet(sku))
    open_ = {check for check, outcome in result.verdicts[0].checks.items() if outcome is Outcome.UNSUPPORTED}
    # Of the node's own: no image, bond or connection tracking is declared.
    of_the_node = {check for check in open_ if not check.startswith("accelerator.")}
    assert of_the_node <= {"host.container_start", "network.bonds", "network.conntrack"}
    profile = rule_book().profiles.find(sku)
    if profile.vendor:
        functions = {
            check.name: check.spec.collect
            for check in rule_book().catalogue
            if check.family == "accelerator" and check.spec.needs in ("accelerator", profile.vendor)
        }
        cannot = {
            name
            for name, function in functions.items()
            if function not in SEEN_WITHOUT_THE_MAKERS_TOOL | set(MAKERS[profile.vendor].checks)
        }
        assert {check for check in open_ if check.startswith("accelerator.")} == cannot - profile.skip


@pytest.mark.parametrize("sku", SKUS)
async def test_a_node_whose_sku_nobody_declared_is_recognised_by_its_devices(sku: str) -> None:
    nodes = fleet(sku)
    rules = rule_book()
    profile = rules.profiles.find(sku)
    answers = nodes["n1"].kind.healthy.answers["accelerator.count"]
    shown = [answer.value for answer in answers if answer.metric == "pci_id"]
    assert len(shown) == profile.accelerators
    if profile.pci:
        assert rules.kind(Node("n1"), [str(one) for one in shown]).sku == profile.name


async def test_a_thousand_healthy_nodes_differ_in_what_they_measure_and_none_is_an_outlier() -> None:
    result = await judge(fleet("h100-sxm", count=1000), "quick")
    assert result.summary[Verdict.HEALTHY] == 1000
    totals = {value for m in result.members for _, value in m.measured["host.memory.total"]}
    assert len(totals) > 900


def test_values_yaml_speaks_of_nothing_that_the_catalogue_does_not_have() -> None:
    known: set[str] = set()
    for check in load_catalogue():
        known |= {check.family, check.name, *(f"{check.name}.{metric}" for metric in check.spec.metrics)}
    assert set(said_names()) - known == set()


def test_values_yaml_names_only_classes_of_devices_that_nodes_have() -> None:
    classes = set(fleet("h100-sxm")["n1"].kind.healthy.devices)
    assert {one for named in said_names().values() for one in named} <= classes


def test_everything_that_a_check_asks_for_is_answered_by_a_record_in_the_agents_own_format() -> None:
    checks = [
        check_request(check.name, check.spec) for check in load_catalogue() if check.name != WATCH_CHECK
    ]
    bundled = bundle(checks)
    nonce = fresh_nonce()
    decoder = Decoder(nonce, bundled.checks)
    for frame in fleet("h100-sxm")["n1"].frames(nonce, bundled.payload, time.time()):
        decoder.feed(frame, time.time())
    assert decoder.done
    assert decoder.faults == []
    assert set(decoder.records) == set(bundled.checks)
    assert not [r for r in decoder.records.values() if r.status in (Status.ERROR, Status.TIMEOUT)]
    assert decoder.hello["vendors"] == "accelerator,nvidia"
    assert decoder.hello["hostname"] == "n1"


def test_the_same_seed_gives_the_same_answers_and_another_one_others() -> None:
    bundled = bundle([check_request("host.memory", load_catalogue().check("host.memory").spec)])
    first, again, other = (
        fleet("h100-sxm", seed=seed)["n1"].frames("0" * 16, bundled.payload, 0.0) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "payload", [b"", b"nonsense", bytes.fromhex("789c030000000001"), b"x\x9c\xab\xae\x05\x00"]
)
def test_a_request_that_the_agent_could_not_read_is_refused(payload: bytes) -> None:
    with pytest.raises(BadPayload):
        fleet("h100-sxm")["n1"].frames("0" * 16, payload, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "== 0",
        "!= half",
        "!= 0",
        "< 5",
        "<= 5",
        "< 0",
        "> 5",
        ">= 0.99",
        "in a, b",
        "between -1 and 5",
        "known",
    ],
)
def test_a_value_is_drawn_from_every_kind_of_limit_that_has_one(text: str) -> None:
    limit = parse(text)
    assert limit.holds(value_within(Demand(limit, None, "default"), "")) is True


def test_a_limit_without_an_obvious_value_must_be_answered_by_values_yaml(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "schema: ltpctl/checks/1\nfamily: site\nchecks:\n  site.name:\n    what: w\n    why: y\n    fix: f\n"
        "    level: quick\n    command: [hostname]\n    parse: {kind: text}\n"
        "    metrics: {name: {what: w, limit: {fail: 'matches n[0-9]+'}}}\n"
    )
    catalogue = load_catalogue([file])
    rules = RuleBook(catalogue, load_profiles(catalogue))
    from probes.simulate.healthy import healthy_node

    with pytest.raises(UsageError, match=r"own.yaml:4: site.name.name: no value can be drawn from matches"):
        healthy_node(catalogue, rules, rules.profiles.find("generic-cpu"))
