"""Whole validations of nodes behind a real sshd, beside tools that send as many bytes to as many nodes.

``python -m benchmarks.fanout --quick-plan [--nodes 64,256]``, as root. Every node runs the real agent, all of
them on this machine, so that the server's CPU, not the client's, decides how long it takes. What a tool costs
before it has done anything is told apart: by a run with one node, which is subtracted.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.fanout.__main__ import ANSWER, AT_ONCE, Row, measure
from benchmarks.fanout.servers import PORT, Sshd, addresses, sshd
from probes.agent.bundle import bundle, check_request
from probes.catalogue import load_catalogue
from probes.plan import make_plan

SWALLOW = f"cat >/dev/null; echo {ANSWER}"
"""What the other tools run on a node: it takes in what is sent and does nothing with it."""

Tool = Callable[[Sshd, list[str], Path], list[str]]


def _ltpctl(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    """The command as a person gives it, ledger and all."""
    defaults = {"user": server.user, "port": PORT, "identity": str(server.key), "sku": "generic-cpu"}
    nodes = {f"n{number:04d}": {"address": host} for number, host in enumerate(hosts)}
    (folder / "cluster.yaml").write_text(json.dumps({"cluster": "b", "defaults": defaults, "nodes": nodes}))
    settings = {
        "inventory": str(folder / "cluster.yaml"),
        "state_dir": str(folder / "state"),
        "ssh": {"config": [], "known_hosts": [str(server.known_hosts)]},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    shutil.rmtree(folder / "state", ignore_errors=True)
    program = "from ltpctl.cli import main; main()"
    words = ["validate", "nodes", "--quick", "--json", "--config", str(folder / "config.yaml")]
    return [sys.executable, "-c", program, *words]


def _clush(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    options = f"-F {server.client_config} -oKexAlgorithms=curve25519-sha256"
    return ["clush", "--hostfile", str(folder / "hosts"), "-f", str(AT_ONCE), "-o", options, SWALLOW]


def _xargs(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    one = 'exec ssh -F "$1" -oKexAlgorithms=curve25519-sha256 "$3" "$4" <"$2"'
    words = ["sh", "-c", one, "sh", str(server.client_config), str(folder / "sent"), "{}", SWALLOW]
    return ["xargs", "-a", str(folder / "hosts"), "-P", str(AT_ONCE), "-I{}", *words]


TOOLS: dict[str, Tool] = {
    "ltpctl validate nodes --quick": _ltpctl,
    "clush, as many bytes": _clush,
    "xargs -P ssh, as many bytes": _xargs,
}


def compare(sizes: list[int]) -> None:
    payload = _payload()
    print(f"{len(payload)} bytes are sent to each node.\n\n{_HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sent").write_bytes(payload)
        with sshd(folder) as server:
            for tool in TOOLS:
                # Twice: the first finds Python's bytecode files not yet written, and its files not in memory.
                alone = _run(tool, 1, server, folder) and _run(tool, 1, server, folder)
                for nodes in sizes:
                    row = _run(tool, nodes, server, folder) if alone else None
                    if alone is None or row is None:
                        print(f"| {tool} | {nodes} | not installed | | | | | |", flush=True)
                    else:
                        _show(row, alone)


def _payload() -> bytes:
    catalogue = load_catalogue()
    plan = make_plan(catalogue, "quick")
    return bundle([check_request(check.name, check.spec) for check in plan.quiet]).payload


def _run(tool: str, nodes: int, server: Sshd, folder: Path) -> Row | None:
    hosts = addresses(nodes)
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    command = TOOLS[tool](server, hosts, folder)
    if tool == "clush, as many bytes":
        return measure(tool, command, nodes, server, folder / "sent")
    if tool.startswith("ltpctl"):
        return measure(tool, command, nodes, server, answers=_answered)
    return measure(tool, command, nodes, server)


def _answered(document: str) -> int:
    """Nodes of which every check came back."""
    nodes = json.loads(document)["nodes"] if document else []
    return sum(not any(f["check"].startswith("transport.") for f in node["findings"]) for node in nodes)


_HEAD = (
    "| tool | nodes | answered | wall s | client CPU ms with one node | client CPU ms for each further node "
    "| server CPU ms a node | client peak MB |\n|---|---|---|---|---|---|---|---|"
)


def _show(row: Row, alone: Row) -> None:
    more = row.client_ms_a_node * row.nodes - alone.client_ms_a_node
    each = f"{more / (row.nodes - 1):.1f}" if row.nodes > 1 else ""
    print(
        f"| {row.tool} | {row.nodes} | {row.answered} | {row.wall_s:.1f} | {alone.client_ms_a_node:.0f} "
        f"| {each} | {row.server_ms_a_node:.0f} | {row.peak_mb:.0f} |",
        flush=True,
    )
