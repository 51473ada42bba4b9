"""The nodes of an inventory as people and programs are shown them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from inventory.fleet import Node
    from inventory.ledger import NodeState


def described(node: Node, state: NodeState) -> dict[str, Any]:
    """One node as ``--json`` shows it; passwords are where it says, never here."""
    bmc = None
    if node.bmc is not None:
        bmc = {
            "kind": node.bmc.kind,
            "address": node.bmc.address,
            "user": node.bmc.user,
            "password_env": node.bmc.password_env,
            "password_file": node.bmc.password_file,
            "verify_tls": node.bmc.verify_tls,
        }
    return {
        "node": node.name,
        "state": state.state,
        "since": moment(state.since),
        "reason": state.reason,
        "address": node.address,
        "user": node.user,
        "port": node.port,
        "jump": node.jump,
        "identity": node.identity,
        "local": node.local,
        "sku": node.sku,
        "accelerators": node.accelerators,
        "groups": sorted(node.groups),
        "labels": dict(node.labels),
        "bmc": bmc,
        "python": node.python,
        "vars": dict(node.vars),
        "origin": node.origin,
    }


def rows(nodes: Iterable[Node], states: Mapping[str, NodeState], expand: bool) -> list[list[object]]:
    """What a table shows: a line for all nodes that are alike, or with `expand` for each."""
    from inventory.fleet import fold

    alike: dict[tuple[object, ...], list[Node]] = {}
    for node in nodes:
        said = (node.user, node.sku, node.accelerators, node.groups, states[node.name].state, node.local)
        alike.setdefault((node.name, *said) if expand else said, []).append(node)
    lines: list[list[object]] = []
    for same in alike.values():
        first = same[0]
        lines.append(
            [
                fold([node.name for node in same]),
                len(same),
                _addresses(same),
                first.user,
                first.sku,
                first.accelerators,
                ",".join(sorted(first.groups)),
                states[first.name].state,
            ]
        )
    return lines


def moment(seconds: float | None) -> str | None:
    """Unix time to the second: ``2026-01-02T03:04:05Z``."""
    from datetime import UTC, datetime

    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _addresses(nodes: Sequence[Node]) -> str:
    """Where nodes are reached, folded: ``10.0.0.[1-64]:2222``."""
    from inventory.fleet import fold

    if nodes[0].local:
        return "this machine"
    hosts = fold(list(dict.fromkeys(node.host for node in nodes)))
    if len(hosts) > 60:
        hosts = f"{len(nodes)} addresses"
    ports = {node.port or 22 for node in nodes}
    return hosts if ports == {22} else f"{hosts}:{fold([str(port) for port in sorted(ports)])}"
