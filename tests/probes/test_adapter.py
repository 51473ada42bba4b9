"""Adapters: a YAML file makes checks for an unknown make of device, judged by the common limits."""

from pathlib import Path

import pytest

from inventory.document import read
from inventory.errors import DocumentError
from probes import criteria
from probes.adapter import read_adapter
from probes.agent import bundle, lanes
from probes.agent.api import TimedOut, Unsupported
from probes.catalogue import Catalogue, load_catalogue
from probes.checks import declared
from probes.model import CheckRecord, Measure, Outcome, Status
from tests.probes.replay import Answer, ReplayHost

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
FIXTURES = Path(__file__).parent / "fixtures" / "adapters"
SNAPSHOT = (FIXTURES / "tt-smi.json").read_text()
STATUS = (FIXTURES / "acme-status.txt").read_text()
LINKS = (FIXTURES / "acme-links.txt").read_text()

TT_SMI = ("tt-smi", "-s", "--snapshot_no_tty")


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue(extra=[EXAMPLES])


def outcome(catalogue: Catalogue, check: str, commands: dict[tuple[str, ...], Answer]) -> criteria.Judged:
    """What a node's answer to these commands comes to: by request, collector and limits."""
    request = bundle.check_request(check, catalogue.check(check).spec)
    measures = declared.collect(ReplayHost(commands=commands, params=dict(request.params)))
    told = tuple(Measure(m.metric, m.device, m.value) for m in measures)
    record = CheckRecord(check, Status.ANSWERED, measures=told)
    return criteria.judge(criteria.compile_rules(catalogue), check, record)


@pytest.mark.parametrize("check", ["versions", "temperature", "power", "clocks"])
def test_a_make_with_json_passes_when_healthy(catalogue: Catalogue, check: str) -> None:
    assert outcome(catalogue, f"tenstorrent.{check}", {TT_SMI: SNAPSHOT}).outcome is Outcome.PASS


@pytest.mark.parametrize("check", ["temperature", "ecc", "links"])
def test_a_make_with_lines_passes_when_healthy(catalogue: Catalogue, check: str) -> None:
    commands: dict[tuple[str, ...], Answer] = {("acmectl", "status"): STATUS, ("acmectl", "links"): LINKS}
    assert outcome(catalogue, f"acme.{check}", commands).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("check", "healthy", "broken", "metric", "expected"),
    [
        ("acme.ecc", "acme1: temp=42.0C ue=0", "acme1: temp=42.0C ue=2", "uncorrectable", Outcome.FAIL),
        ("acme.temperature", "temp=42.0C", "temp=97.0C", "core", Outcome.FAIL),
        ("acme.temperature", "temp=42.0C", "temp=88.0C", "core", Outcome.WARN),
        ("acme.links", "acme1   4   0", "acme1   3   1", "down", Outcome.FAIL),
    ],
)
def test_a_fault_fails_by_the_common_limit_or_the_adapters_own(
    catalogue: Catalogue, check: str, healthy: str, broken: str, metric: str, expected: Outcome
) -> None:
    assert healthy in STATUS + LINKS
    commands: dict[tuple[str, ...], Answer] = {
        ("acmectl", "status"): STATUS.replace(healthy, broken),
        ("acmectl", "links"): LINKS.replace(healthy, broken),
    }
    (found,) = outcome(catalogue, check, commands).findings
    assert (found.metric, found.device, found.outcome) == (metric, "acme1", expected)
    assert found.action


def test_a_missing_reading_of_a_card_with_json_is_no_pass(catalogue: Catalogue) -> None:
    broken = SNAPSHOT.replace('"asic_temperature": "38.1"', '"asic_temperature": null')
    judged = outcome(catalogue, "tenstorrent.temperature", {TT_SMI: broken})
    assert [(found.metric, found.device) for found in judged.findings] == [("core", "0000:41:00.0")]


def test_what_the_tool_does_wrong_stays_visible(catalogue: Catalogue) -> None:
    with pytest.raises(ValueError):
        outcome(catalogue, "tenstorrent.temperature", {TT_SMI: "Traceback (most recent call last):"})
    with pytest.raises(Unsupported):
        outcome(catalogue, "tenstorrent.temperature", {})
    with pytest.raises(TimedOut):
        outcome(catalogue, "tenstorrent.temperature", {TT_SMI: TimedOut("tt-smi")})


def test_the_checks_run_only_where_the_device_is(catalogue: Catalogue) -> None:
    assert catalogue.check("tenstorrent.power").spec.needs == "1e52:*"
    assert catalogue.check("acme.ecc").spec.needs == "/dev/acme[0-9]*"
    elsewhere = lanes.absent({"check": "acme.ecc", "needs": "/dev/no-such-device[0-9]*"}, [])
    assert elsewhere is not None
    assert '"not_applicable"' in elsewhere
    assert lanes.absent({"check": "acme.ecc", "needs": "/dev/nul?"}, []) is None


GOOD = """\
schema: ltpctl/adapter/1
vendor: acme
what: Acme
recognise: {pci: ["1234:*"]}
command: [acmectl]
checks:
  temperature:
    parse: {kind: key_value, fields: {core: temp}}
"""


def test_a_minimal_adapter_is_read() -> None:
    assert list(read_adapter(read("a.yaml", GOOD))) == ["acme.temperature"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("temperature:", "temprature:", r"a\.yaml:7: checks\.temprature: .*did you mean 'temperature'"),
        ("{core: temp}", "{cor: temp}", r"a\.yaml:8: .*did you mean 'core'"),
        ('["1234:*"]', '["1234"]', r"a\.yaml:4: recognise\.pci"),
        ('{pci: ["1234:*"]}', '{pci: ["1234:*"], node: /dev/a}', r"a\.yaml:4: recognise: .*not both"),
        ('{pci: ["1234:*"]}', "{}", r"a\.yaml:4: recognise: needs either"),
        ("vendor: acme", "vendor: accelerator", r"a\.yaml:2: vendor: .*own family"),
        (", fields: {core: temp}", "", r"a\.yaml:8: checks\.temperature\.parse: says no metric"),
        ("command: [acmectl]\n", "", r"command: this key is required"),
        (
            "    parse:",
            "    limits: {memory: {fail: '< 3'}}\n    parse:",
            r"a\.yaml:8: .*this metric is not read",
        ),
    ],
)
def test_a_mistake_in_an_adapter_is_told_with_its_line(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(DocumentError, match=said):
        read_adapter(read("a.yaml", GOOD.replace(old, new)))
