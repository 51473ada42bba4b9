"""Every fault that can be planted is found where it is, and nowhere else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from inventory.transport import Limits, Retry
from inventory.transport.settings import Address, SshSettings
from inventory.transport.ssh import SshTransport
from probes.model import Finding, NodeVerdict, Verdict
from probes.plan import make_plan
from probes.simulate.fleet import simulated_nodes
from probes.simulate.node import SimulatedNode
from probes.simulate.scenario import PlantedFault, ScenarioFile, build, fault_kinds
from probes.simulate.server import serve
from probes.validate import Options, validate
from tests.simulate.in_process import complaints, fleet, judge, rule_book

UNHEALTHY, DEGRADED, UNKNOWN, HEALTHY = Verdict.UNHEALTHY, Verdict.DEGRADED, Verdict.UNKNOWN, Verdict.HEALTHY


class Expected(NamedTuple):
    verdict: Verdict
    check: str
    device: str | None = None


ON_THE_NODE = {
    "ecc_uncorrectable": Expected(UNHEALTHY, "accelerator.ecc", "3"),
    "remap_failed": Expected(UNHEALTHY, "accelerator.remapped_rows", "1"),
    "accelerator_missing": Expected(UNHEALTHY, "accelerator.count", "0000:30:00.0"),
    "pcie_width": Expected(UNHEALTHY, "accelerator.pcie", "0000:38:00.0"),
    "link_down": Expected(UNHEALTHY, "accelerator.links", "2"),
    "thermal": Expected(UNHEALTHY, "accelerator.throttle", "6"),
    "driver_fault": Expected(UNHEALTHY, "accelerator.driver_events", "0000:30:00.0"),
    "driver_skew": Expected(DEGRADED, "accelerator.versions"),
    "tool_hangs": Expected(UNKNOWN, "accelerator.tool_responds"),
    "no_vendor_tool": Expected(UNKNOWN, "accelerator.ecc"),
    "in_use": Expected(DEGRADED, "accelerator.processes", "0"),
    "slow_gemm": Expected(DEGRADED, "compute.gemm", "0"),
    "wrong_results": Expected(UNHEALTHY, "compute.golden", "7"),
    "errors_under_load": Expected(DEGRADED, "load.counters", "0000:10:00.0"),
    "slow_collective": Expected(DEGRADED, "collective.node_allreduce"),
    "memory_short": Expected(UNHEALTHY, "host.memory"),
    "memory_errors": Expected(UNHEALTHY, "host.machine_checks"),
    "clock_off": Expected(UNHEALTHY, "host.clock"),
    "disk_full": Expected(UNHEALTHY, "storage.space", "/"),
    "dead_mount": Expected(UNHEALTHY, "storage.hang", "/scratch"),
    "slow_disk": Expected(DEGRADED, "storage.io", "/var/tmp"),
    "rdma_stuck": Expected(UNHEALTHY, "network.rdma_ports"),
    "link_flaps": Expected(UNHEALTHY, "network.link_flaps", "eth1"),
}

ON_THE_WAY = {
    "unresolvable": Expected(UNKNOWN, "transport.resolve"),
    "refuse": Expected(UNKNOWN, "transport.connect"),
    "silent": Expected(UNKNOWN, "transport.banner"),
    "trickle": Expected(UNKNOWN, "transport.banner"),
    "wrong_host_key": Expected(UNKNOWN, "transport.host_key"),
    "auth_refused": Expected(UNKNOWN, "transport.auth"),
    "hang_after_auth": Expected(UNKNOWN, "transport.exec"),
    "hang_in_command": Expected(UNKNOWN, "transport.command"),
    "no_python": Expected(UNKNOWN, "agent.start"),
    "forced_command": Expected(UNKNOWN, "agent.start"),
    "drop": Expected(UNKNOWN, "transport.command"),
    "killed": Expected(UNKNOWN, "transport.command"),
    "flood": Expected(UNKNOWN, "transport.output"),
    "noise": Expected(HEALTHY, ""),
    "slow_answer": Expected(HEALTHY, ""),
}

ELSEWHERE = {
    ("ascend910b", "thermal"): "accelerator.temperature",
    ("mi300x", "no_vendor_tool"): "accelerator.idle_memory",
    ("gaudi3", "no_vendor_tool"): "accelerator.idle_memory",
}
"""Where a SKU's nodes tell of a fault by another check: npu-smi has no throttle reasons, and only what a
profile makes demands on must be answered."""

WORDS = {
    "refuse": "refused the connection",
    "silent": "no SSH banner",
    "wrong_host_key": "CHANGED",
    "no_python": "no python3",
    "forced_command": "may only submit jobs",
    "drop": "connection was lost",
    "killed": "KILL",
}
"""What tells these from others of the same check."""


def test_every_kind_of_fault_has_an_expectation_here() -> None:
    assert set(fault_kinds()) == set(ON_THE_NODE) | set(ON_THE_WAY)


@pytest.mark.parametrize("kind", sorted(ON_THE_NODE))
async def test_a_fault_of_a_node_is_found_there_and_its_peers_stay_healthy(kind: str) -> None:
    result = await judge(fleet("h100-sxm", n3=kind))
    verdicts = {verdict.node: verdict for verdict in result.verdicts}
    expected = ON_THE_NODE[kind]
    assert {name for name, verdict in verdicts.items() if verdict.verdict is not HEALTHY} == {"n3"}
    assert verdicts["n3"].verdict is expected.verdict
    assert expected.device in {f.device for f in _of(verdicts["n3"], expected.check)}


async def test_loading_checks_are_withheld_from_a_node_in_use() -> None:
    result = await judge(fleet("h100-sxm", n3="in_use"))
    verdict = next(v for v in result.verdicts if v.node == "n3")
    assert complaints(verdict) == {"accelerator.processes"}
    assert any("the node is in use" in finding.message for finding in _of(verdict, "compute.gemm"))


async def test_a_lost_accelerator_is_gone_from_what_its_makers_tool_reports() -> None:
    result = await judge(fleet("h100-sxm", n3="accelerator_missing"))
    of_node = {m.node: m.measured for m in result.members}
    assert len(of_node["n1"]["accelerator.temperature.core"]) == 8
    assert [device for device, _ in of_node["n3"]["accelerator.temperature.core"]] == list("0123567")


@pytest.mark.parametrize("sku", ["mi300x", "gaudi3", "ascend910b", "generic-cpu"])
async def test_every_fault_that_a_sku_can_have_is_found_on_it(sku: str) -> None:
    fleets = {kind: nodes for kind in ON_THE_NODE if (nodes := _possible(sku, kind))}
    assert len(fleets) >= 8
    for kind, nodes in fleets.items():
        result = await judge(nodes)
        bad = {v.node: v for v in result.verdicts if v.verdict is not HEALTHY}
        assert set(bad) == {"n3"}, kind
        check = ELSEWHERE.get((sku, kind), ON_THE_NODE[kind].check)
        assert check in complaints(bad["n3"]), kind


def _possible(sku: str, kind: str) -> dict[str, SimulatedNode]:
    try:
        return fleet(sku, count=5, n3=kind)
    except UsageError:
        return {}


async def test_every_way_to_misbehave_has_its_own_outcome_and_delays_nobody_else(tmp_path: Path) -> None:
    kinds = sorted(ON_THE_WAY)
    names = {f"n{index + 1}": kind for index, kind in enumerate(kinds)}
    file = ScenarioFile(
        schema="ltpctl/sim/1",
        nodes=f"n[1-{len(kinds) + 4}]",
        faults=tuple(PlantedFault(nodes=node, kind=kind) for node, kind in names.items()),
    )
    nodes = simulated_nodes(build(file))
    limits = Limits(resolve=1, connect=1, banner=1, handshake=5, auth=5, exec=1, output=2)
    async with serve(nodes) as served:
        key, known_hosts = tmp_path / "key", tmp_path / "known_hosts"
        key.write_bytes(served.client_key)
        key.chmod(0o600)
        known_hosts.write_text(f"[127.101.*]:{served.port} {served.host_key}\n")
        settings = SshSettings(
            known_hosts=(str(known_hosts),),
            config_files=(),
            identities=(str(key),),
            user="sim",
            agent=False,
            retry=Retry(attempts=1),
            resolver=_loopback_only,
        )
        known = [
            Node(name, address=address, port=served.port, sku="h100-sxm")
            for name, address in served.addresses.items()
        ]
        rules = rule_book()
        plan = make_plan(rules.catalogue, "quick", only=["host", "accelerator.count"])
        # The limit of the command itself is the budget and some seconds for the agent to end by itself.
        options = Options(limits=limits, quiet_budget=0.5)
        async with SshTransport(settings) as transport:
            result = await validate(known, plan, transport, rules, options=options)
    verdicts = {verdict.node: verdict for verdict in result.verdicts}
    for node, kind in names.items():
        expected = ON_THE_WAY[kind]
        assert verdicts[node].verdict is expected.verdict, (kind, verdicts[node].findings)
        assert complaints(verdicts[node]) == ({expected.check} - {""}), kind
        if words := WORDS.get(kind):
            assert words in _of(verdicts[node], expected.check)[0].message
        if kind not in ("hang_in_command", "slow_answer"):
            assert verdicts[node].seconds < 20, kind
    assert {verdicts[f"n{len(kinds) + i}"].verdict for i in (1, 2, 3, 4)} == {HEALTHY}
    assert result.seconds < 80


def test_a_fault_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ecc_uncorrectable .* changes nothing on nodes of SKU generic-cpu"):
        fleet("generic-cpu", n1="ecc_uncorrectable")


async def _loopback_only(host: str, port: int) -> Sequence[Address]:
    await asyncio.sleep(0)
    if host.endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [(socket.AF_INET, (host, port))]


def _of(verdict: NodeVerdict, check: str) -> list[Finding]:
    return [finding for finding in verdict.findings if finding.check == check]
