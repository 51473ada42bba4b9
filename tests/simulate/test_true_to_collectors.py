"""Simulated nodes name metrics and devices as the real collectors do on captured nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest

from probes.catalogue import load_catalogue
from probes.model import Status
from tests.probes.checks import server_node
from tests.probes.checks.accelerator_nodes import collect, hgx
from tests.probes.checks.test_accelerator_amd import ALL as AMD_CHECKS
from tests.probes.checks.test_accelerator_amd import mi300x
from tests.probes.replay import ReplayHost
from tests.simulate.in_process import fleet

Shape = dict[str, set[str]]
"""Metric -> how its devices are named."""

BUS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")

NVIDIA_CHECKS = [
    "count", "versions", "health", "ecc", "remapped_rows", "clocks", "throttle", "temperature", "power",
    "idle_memory", "processes", "pcie", "aer", "persistence", "partition", "fabric", "peermem",
]  # fmt: skip
"""Those that one report and sysfs answer."""

NOT_SIMULATED = {"network.bonds", "network.conntrack"}
"""A simulated node has neither."""

ONLY_WITH_ERRORS = {"host.pcie_aer.correctable_per_hour"}
"""Named for the devices that have some, and for the node where none has: the captured server has."""


@pytest.mark.parametrize("check", NVIDIA_CHECKS)
def test_nvidia_accelerators_are_named_as_on_a_captured_node(check: str) -> None:
    _compare(f"accelerator.{check}", _shape_of(check, hgx), _simulated("h100-sxm", f"accelerator.{check}"))


@pytest.mark.parametrize("check", AMD_CHECKS)
def test_amd_accelerators_are_named_as_on_a_captured_node(check: str) -> None:
    _compare(f"accelerator.{check}", _shape_of(check, mi300x), _simulated("mi300x", f"accelerator.{check}"))


def test_parts_of_a_host_are_named_as_on_a_captured_server() -> None:
    compared = 0
    for check in load_catalogue():
        if check.family not in server_node.FAMILIES or check.name in NOT_SIMULATED:
            continue
        record = server_node.record(check.name, server_node.server())
        if record.status is Status.ANSWERED:
            real = _shape((m.metric, m.device) for m in record.measures)
            _compare(check.name, real, _simulated("h100-sxm", check.name))
            compared += 1
    assert compared > 40


def _compare(check: str, real: Shape, simulated: Shape) -> None:
    """What is measured is simulated, by devices of the same kind. A simulated node may measure more."""
    assert set(real) <= set(simulated)
    alike = [metric for metric in real if f"{check}.{metric}" not in ONLY_WITH_ERRORS]
    assert {metric: real[metric] for metric in alike} == {metric: simulated[metric] for metric in alike}


def _shape_of(check: str, node: Callable[[], ReplayHost]) -> Shape:
    return _shape((m.metric, m.device) for m in collect(check, node()))


def _simulated(sku: str, check: str) -> Shape:
    answers = fleet(sku, count=1)["n1"].kind.healthy.answers.get(check, ())
    return _shape((answer.metric, answer.device) for answer in answers)


def _shape(measures: Iterable[tuple[str, str | None]]) -> Shape:
    found: Shape = {}
    for metric, device in measures:
        found.setdefault(metric, set()).add(_kind(device))
    return found


def _kind(device: str | None) -> str:
    if device is None:
        return "node"
    return "bus" if BUS.fullmatch(device) else ("number" if device.isdecimal() else "name")
