"""Logging in to every node to see whether it can be reached, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inventory.fleet import Node
    from inventory.transport import Outcome
    from ltpctl.frame import Session


def connected(session: Session, nodes: Sequence[Node], accept_new: bool) -> list[Outcome]:
    """How ``true`` ended on each of `nodes`, in their order. `accept_new`: trust unknown host keys."""
    import asyncio

    from inventory.transport import Command, transport_for
    from inventory.transport.fanout import fan_out
    from ltpctl.wiring import limits

    section = session.configuration.settings.ssh
    command = Command(("true",), limits=limits(section, command=30.0))

    async def all_of_them() -> list[Outcome]:
        settings = session.ssh_settings(accept_new)
        async with transport_for(nodes, settings, session.fleet.nodes) as transport:
            work = ((node, command) for node in nodes)
            return [outcome async for outcome in fan_out(transport, work, section.concurrency)]

    position = {node.name: at for at, node in enumerate(nodes)}
    return sorted(asyncio.run(all_of_them()), key=lambda outcome: position[outcome.node])


def connection(outcome: Outcome) -> dict[str, Any]:
    """One outcome as ``--json`` shows it."""
    return {
        "node": outcome.node,
        "ok": outcome.ok,
        "phase": outcome.phase,
        "ending": outcome.ending,
        "message": outcome.message,
        "seconds": round(outcome.seconds, 3),
    }


def show_connections(session: Session, outcomes: Sequence[Outcome]) -> None:
    """Outcomes for people: how many were reached, and the others, folded by what hindered them."""
    from inventory.fleet import fold

    reached = [outcome.node for outcome in outcomes if outcome.ok]
    session.out.line(
        f"connected to {len(reached)} of {len(outcomes):,} {'node' if len(outcomes) == 1 else 'nodes'}"
    )
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        alike: dict[tuple[str, str, str], list[str]] = {}
        for outcome in failed:
            message = outcome.message.replace(outcome.node, "NODE")
            alike.setdefault((outcome.phase, outcome.ending, message), []).append(outcome.node)
        rows = [[fold(names), *key] for key, names in alike.items()]
        session.out.table(("nodes", "phase", "ending", "message"), rows, wrap=frozenset({"nodes", "message"}))
