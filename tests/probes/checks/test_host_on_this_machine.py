"""Host, network and BMC checks and the declarative examples, through the agent on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.agent.api import Ran
from probes.agent.bundle import check_request
from probes.catalogue import load_catalogue
from probes.checks import declared
from probes.criteria import compile_rules, judge
from probes.model import CheckRecord, Measure, Outcome, Status
from tests.probes.agent.agent_process import run
from tests.probes.checks.server_node import catalogue
from tests.probes.replay import Answer, ReplayHost

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "checks"
EXAMPLE_CHECKS = [check for check in load_catalogue(extra=[EXAMPLES]) if not check.built_in]


def test_no_check_breaks_or_lingers_on_this_machine() -> None:
    wanted = [check_request(check.name, check.spec) for check in catalogue()]
    records = run(*wanted, budget=100.0)
    assert set(records) == {check.name for check in catalogue()}
    odd = {
        name: (r.status, r.detail)
        for name, r in records.items()
        if r.status not in (Status.ANSWERED, Status.UNSUPPORTED, Status.NOT_APPLICABLE)
    }
    assert odd == {}
    # Whatever else a Linux machine lacks, it has these.
    for name in ("host.cpu", "host.memory", "host.swap", "host.processes", "network.loopback"):
        assert records[name].status is Status.ANSWERED


def test_an_ordinary_machine_is_not_condemned_for_how_it_is_set_up() -> None:
    # Swap, governor, uptime, clock daemon, BMC: a laptop or virtual machine may have them or not.
    rules = compile_rules(catalogue())
    setup = ("host.swap", "host.frequency", "host.uptime", "host.huge_pages", "host.iommu", "host.versions")
    records = run(*[check_request(name, catalogue().check(name).spec) for name in setup])
    assert {judge(rules, name, records[name]).outcome for name in setup} <= {
        Outcome.PASS,
        Outcome.UNSUPPORTED,
    }


def test_the_examples_run_as_they_are() -> None:
    records = run(*[check_request(check.name, check.spec) for check in EXAMPLE_CHECKS])
    assert {record.status for record in records.values()} <= {Status.ANSWERED, Status.UNSUPPORTED}, records
    for name in ("site.scratch", "topology.distribution", "processes.unwanted", "processes.huge_pages"):
        assert records[name].status is Status.ANSWERED


LINKS = """[{"ifname": "lo", "mtu": 65536, "operstate": "UNKNOWN"},
            {"ifname": "eth0", "mtu": 576, "operstate": "UP"}]"""
LSBLK = ("lsblk", "-d", "-b", "-I", "8,259,253,254", "-o", "NAME,RO,SIZE")
FAULTS: list[tuple[str, dict[str, str], dict[tuple[str, ...], Answer], str, Outcome]] = [
    (
        "site.scratch",
        {},
        {("test", "-d", "/tmp", "-a", "-w", "/tmp"): Ran(1, "", "")},
        "status",
        Outcome.FAIL,
    ),
    ("links.state", {}, {("ip", "-j", "link", "show"): LINKS}, "mtu", Outcome.FAIL),
    ("thermal.zones", {"/sys/class/thermal/thermal_zone0/temp": "91000\n"}, {}, "millidegrees", Outcome.WARN),
    (
        "topology.processors",
        {},
        {("lscpu",): "CPU(s):  8\nThread(s) per core:  3\n"},
        "threads",
        Outcome.FAIL,
    ),
    ("processes.unwanted", {}, {("ps", "-e", "-o", "comm="): "bash\nxmrig\n"}, "running", Outcome.FAIL),
    ("processes.disks", {}, {LSBLK: "NAME RO SIZE\nsda 0 9\nsdb 1 9\n"}, "read_only", Outcome.WARN),
    ("processes.huge_pages", {"/proc/meminfo": "HugePages_Total: 2000000\n"}, {}, "pages", Outcome.WARN),
    ("service.status", {"/run/site-agent/status": "state=starting\nerrors=0\n"}, {}, "state", Outcome.FAIL),
    ("service.status", {"/run/site-agent/status": "state=ready\nerrors=2\n"}, {}, "errors", Outcome.WARN),
    ("service.logins", {}, {("/bin/sh", "-c", "who | wc -l"): "25\n"}, "people", Outcome.WARN),
]


@pytest.mark.parametrize(("name", "files", "commands", "metric", "outcome"), FAULTS)
def test_each_example_sees_its_fault(
    name: str, files: dict[str, str], commands: dict[tuple[str, ...], Answer], metric: str, outcome: Outcome
) -> None:
    examples = load_catalogue(extra=[EXAMPLES])
    request = check_request(name, examples.check(name).spec)
    host = ReplayHost(files=files, commands=commands, params=dict(request.params))
    measures = tuple(Measure(m.metric, m.device, m.value) for m in declared.collect(host))
    findings = judge(
        compile_rules(examples), name, CheckRecord(name, Status.ANSWERED, measures=measures)
    ).findings
    assert [(f.metric, f.outcome) for f in findings] == [(metric, outcome)]


def test_every_example_has_a_fault_here() -> None:
    trivial = {"topology.distribution"}  # its limit is that the value is known
    assert {check.name for check in EXAMPLE_CHECKS} == {fault[0] for fault in FAULTS} | trivial
