"""2,048 nodes through ``ltpctl validate nodes --quick``: the bad ones are named, memory stays bounded."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.simulate.running import LTPCTL, ended, planted, running

BAD = {
    "node0007": ("ecc_uncorrectable", "unhealthy", "accelerator.ecc"),
    "node0300": ("accelerator_missing", "unhealthy", "accelerator.count"),
    "node0301": ("refuse", "unknown", "transport.connect"),
    "node0512": ("wrong_host_key", "unknown", "transport.host_key"),
    "node0900": ("auth_refused", "unknown", "transport.auth"),
    "node1024": ("driver_skew", "degraded", "accelerator.versions"),
    "node1025": ("ecc_uncorrectable", "unhealthy", "accelerator.ecc"),
    "node1500": ("no_python", "unknown", "agent.start"),
    "node2000": ("refuse", "unknown", "transport.connect"),
    "node2048": ("disk_full", "unhealthy", "storage.space"),
}
"""Ten nodes of eight kinds."""

MOST_MB = 1000
MOST_SECONDS = 110
"""About 20 s on two idle cores, both sides together; the rest is for a machine that is busy."""


@pytest.mark.timeout(240)
def test_ten_bad_nodes_of_eight_kinds_among_2048_are_exactly_the_ones_named_in_bounded_memory(
    tmp_path: Path,
) -> None:
    faults = {node: kind for node, (kind, _, _) in BAD.items()}
    assert (len(faults), len(set(faults.values()))) == (10, 8)
    report = tmp_path / "report.json"
    with running(tmp_path / "sim", "--nodes", "node[0001-2048]", *planted(faults)) as fleet:
        command = [LTPCTL, "validate", "nodes", "--quick", "--json", "--config", fleet.config]
        began = time.monotonic()
        with report.open("w") as stdout:
            process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, text=True)
            client = ended(process, began)
        server = fleet.end()
    for name, side in (("client", client), ("server", server)):
        each = side.cpu_seconds / 2048 * 1000
        print(f"{name}: {side.seconds:.1f} s, {each:.2f} ms of CPU a node, {side.peak_mb:.0f} MB at most")

    nodes = {node["node"]: node for node in json.loads(report.read_text())["nodes"]}
    assert len(nodes) == 2048
    assert {name for name, node in nodes.items() if node["verdict"] != "healthy"} == set(BAD)
    for name, (kind, verdict, check) in BAD.items():
        assert nodes[name]["verdict"] == verdict, kind
        assert check in {finding["check"] for finding in nodes[name]["findings"]}, kind
    assert client.status == 1
    assert server.status == 0
    assert client.peak_mb < MOST_MB
    assert server.peak_mb < MOST_MB
    assert client.seconds < MOST_SECONDS
