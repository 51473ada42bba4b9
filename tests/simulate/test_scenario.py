"""Scenario files: what they may say, and how mistakes in them are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from inventory.errors import DocumentError, UsageError
from probes.simulate.fleet import simulated_nodes
from probes.simulate.scenario import MAX_NODES, Behaviour, fault_kinds, read_scenario
from tests.simulate.in_process import complaints, judge

HEAD = "schema: ltpctl/sim/1\n"


def _file(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(HEAD + text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "nodes: n[1-4]\nfaults:\n  - {nodes: n1, kind: refuse}\n  - {nodes: n2, kind: refused}\n",
            5,
            "refuse",
        ),
        ("nodes: n[1-4]\nfaults:\n  - nodes: n[3-5]\n    kind: refuse\n", 4, "n5 is not one of n[1-4]"),
        (
            "nodes: n[1-4]\nfaults:\n  - {nodes: n1, kind: drop}\n  - {nodes: n1, kind: flood}\n",
            5,
            "hides flood",
        ),
        ("nodes: n[1-4]\nsku: h101\n", 3, "no profile describes the SKU 'h101'"),
        ("nodes: n[1-4]\nskus:\n  n4: mi300y\n", 4, "no profile describes the SKU 'mi300y'"),
        ("nodes: n[1-4]\nskus:\n  n5: mi300x\n", 4, "n5 is not one of n[1-4]"),
        ("nodes: n[1-99999]\n", 2, f"at most {MAX_NODES}"),
        ("nodes: n[1-4\n", 2, "n[1-4"),
        ("nodes: n[1-4]\nlatency: -1\n", 3, "latency"),
        ("nodes: n[1-4]\nfault: []\n", 3, "fault"),
    ],
)
def test_a_mistake_in_a_scenario_is_told_with_its_file_and_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(DocumentError) as raised:
        simulated_nodes(read_scenario(path))
    assert str(raised.value).startswith(f"{path}:{line}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scenario_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.yaml"):
        read_scenario(tmp_path / "no.yaml")


async def test_a_fleet_of_several_skus_is_judged_each_by_its_own(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "nodes: n[1-12]\nsku: h100-sxm\nskus: {'n[5-8]': mi300x, 'n[9-12]': generic-cpu}\n"
        "faults: [{nodes: 'n[2,6]', kind: link_down}, {nodes: n10, kind: memory_short}]\n",
    )
    result = await judge(simulated_nodes(read_scenario(path)))
    bad = {v.node: complaints(v) for v in result.verdicts if complaints(v)}
    assert bad == {
        "n2": {"accelerator.links"},
        "n6": {"accelerator.links"},
        "n10": {"host.memory", "host.dimms"},
    }
    assert [v.sku for v in result.verdicts[3::4]] == ["h100-sxm", "mi300x", "generic-cpu"]


def test_several_faults_may_be_planted_on_one_node(tmp_path: Path) -> None:
    path = _file(tmp_path, "nodes: n[1-2]\nfaults: [{nodes: n1, kind: disk_full}, {nodes: n1, kind: drop}]\n")
    node = simulated_nodes(read_scenario(path))["n1"]
    assert node.behaviour is Behaviour.DROP
    assert {check for effect in node.effects for check in effect.checks} == {"storage.space"}


def test_checks_and_profiles_of_ones_own_are_answered_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "schema: ltpctl/checks/1\nfamily: site\nchecks:\n  site.licence:\n    what: w\n    why: y\n"
        "    fix: f\n"
        "    level: quick\n    command: [licence]\n    parse: {kind: number}\n"
        "    metrics: {days: {what: w, unit: days, limit: {fail: '>= 7'}}}\n"
    )
    (tmp_path / "sku.yaml").write_text(
        "schema: ltpctl/sku/1\nsku: mine\nwhat: ours\nvendor: amd\naccelerators: 4\npci: ['1002:0001']\n"
        "limits: {site.licence.days: {fail: '>= 30'}}\n"
    )
    path = _file(tmp_path, "nodes: n[1-2]\nsku: mine\nchecks: [own.yaml]\nprofiles: [sku.yaml]\n")
    answers = simulated_nodes(read_scenario(path))["n1"].kind.healthy.answers
    assert [(a.metric, a.device, a.value) for a in answers["site.licence"]] == [("days", None, 32)]
    assert len(answers["accelerator.temperature"]) % 4 == 0


def test_every_behaviour_can_be_planted() -> None:
    assert {kind.behaviour for kind in fault_kinds().values()} - {None} == set(Behaviour)
