"""``ltpctl inventory``: the inventory, what the ledger knows of its nodes, and importing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltpctl import frame
from ltpctl.connecting import connected, connection, show_connections
from ltpctl.exits import Exit
from ltpctl.frame import Session
from ltpctl.roster import described, moment, rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from inventory.fleet import Node
    from inventory.ledger import Event, NodeState

app = frame.app("Who the nodes are, how to reach them, what state they are in.")


@frame.command(
    app,
    "list",
    example="ltpctl inventory list\nltpctl inventory list --group rack1 --state available --expand",
    selection=True,
)
def list_(
    session: Session,
    expand: Annotated[
        bool, typer.Option("--expand", help="one node a line; otherwise equal ones fold")
    ] = False,
) -> Exit:
    """The nodes, folded where they are equal, with their state in the ledger."""
    from inventory.fleet import NothingInState

    try:
        nodes = session.nodes()
    except NothingInState as nothing:
        session.out.note(str(nothing))
        nodes = ()
    states = _states(session, nodes)
    if session.out.json:
        session.out.document(
            {
                "schema": "ltpctl/inventory/1",
                "cluster": session.fleet.name,
                "source": session.fleet.source,
                "nodes": [described(node, states[node.name]) for node in nodes],
                "groups": dict(session.fleet.groups),
            }
        )
        return Exit.OK
    columns = ("nodes", "count", "address", "user", "sku", "accelerators", "groups", "state")
    session.out.table(
        columns,
        rows(nodes, states, expand),
        right=frozenset({"count", "accelerators"}),
        wrap=frozenset({"nodes", "address", "groups"}),
        style_by=("state",),
    )
    return Exit.OK


@frame.command(app, "show", example="ltpctl inventory show node017")
def show(
    session: Session,
    node: Annotated[str, typer.Argument(metavar="NODE", help="the name of one node")],
) -> Exit:
    """All that is known of one node: inventory, state, last verdict."""
    found = session.fleet.node(node)
    with session.ledger(read_only=True) as ledger:
        state = ledger.states([node])[node]
        verdict = ledger.last_verdict(node)
    facts = described(found, state)
    facts["last_verdict"] = (
        None
        if verdict is None
        else {"verdict": verdict.verdict, "time": moment(verdict.time), "run": verdict.run}
    )
    if session.out.json:
        session.out.document({"schema": "ltpctl/node/1", **facts})
        return Exit.OK
    for key, value in facts.items():
        if value is not False and value not in (None, {}, [], ""):
            session.out.line(f"{key.replace('_', ' '):13} {_in_words(value)}")
    return Exit.OK


@frame.command(
    app,
    "check",
    example="ltpctl inventory check -i cluster.yaml\nltpctl inventory check -i cluster.yaml --connect",
    selection=True,
)
def check(
    session: Session,
    connect: Annotated[
        bool, typer.Option("--connect", help="also log in to every node and run 'true' there")
    ] = False,
    accept_new: Annotated[
        bool, typer.Option("--accept-new", help="with --connect: trust and keep unknown host keys")
    ] = False,
) -> Exit:
    """Is the inventory right? If not: file, line, field and exit status 2. What is left unsaid is listed."""
    import os

    from inventory.fleet import fold
    from inventory.review import review
    from ltpctl.validation import catalogue, rule_book

    fleet = session.fleet
    # What a validation would refuse is told here.
    rule_book(session, catalogue(session)).check(fleet.nodes.values())
    notes = review(fleet, os.path.exists)
    outcomes = connected(session, session.nodes(), accept_new) if connect else None
    failed = [outcome for outcome in outcomes or () if not outcome.ok]
    session.found = Exit.FINDINGS if failed else Exit.OK
    if session.out.json:
        report: dict[str, Any] = {
            "schema": "ltpctl/inventory-check/1",
            "source": fleet.source,
            "nodes": len(fleet),
            "groups": {group: len(members) for group, members in fleet.groups.items()},
            "warnings": notes,
        }
        if outcomes is not None:
            report["connections"] = [connection(outcome) for outcome in outcomes]
        session.out.document(report)
    else:
        groups = f", {_count(len(fleet.groups), 'group')}" if fleet.groups else ""
        session.out.line(f"{fleet.source}: {_count(len(fleet), 'node')}{groups}: {fold(list(fleet.nodes))}")
        for note in notes:
            session.out.line(f"warning: {note}", "yellow")
        if outcomes is not None:
            show_connections(session, outcomes)
    return session.found


@frame.command(app, "history", example="ltpctl inventory history node017 --limit 20")
def history(
    session: Session,
    node: Annotated[str, typer.Argument(metavar="NODE", help="the name of one node")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="only the newest so many")] = None,
) -> Exit:
    """What happened to a node, oldest first, with who did it and why."""
    with session.ledger(read_only=True) as ledger:
        events = ledger.events(node=node, limit=limit)
    if not events:
        # A node that has left the inventory keeps its history; only one that nobody knows is a mistake.
        session.fleet.node(node)
    if session.out.json:
        session.out.document(
            {"schema": "ltpctl/history/1", "node": node, "events": [_event(event) for event in events]}
        )
        return Exit.OK
    if not events:
        session.out.line(f"nothing is recorded about {node}")
        return Exit.OK
    columns = ("time", "what", "by", "reason", "run")
    lines = [[moment(e.time), _happening(e), e.actor, e.reason, e.run] for e in events]
    session.out.table(columns, lines, wrap=frozenset({"reason"}))
    return Exit.OK


@frame.command(
    app,
    "prune",
    example="ltpctl inventory prune --keep-days 90\nltpctl inventory prune --keep-days 365 --json",
)
def prune(
    session: Session,
    keep_days: Annotated[
        int,
        typer.Option(
            "--keep-days", min=1, max=36500, metavar="DAYS", help="what is older than this is removed"
        ),
    ],
) -> Exit:
    """Remove old validation runs from the ledger, with verdicts and numbers.

    Every event and state is kept, and each node's newest verdict. What was removed is itself an event.
    """
    from time import time

    from ltpctl.actor import actor

    learned_from = session.configuration.settings.validate_.baseline_days
    before = time() - 86400 * keep_days
    with session.ledger() as ledger:
        pruned = ledger.prune(before, actor())
    if keep_days < learned_from:
        session.out.note(
            f"baselines, learned from {learned_from:g} days, now have {keep_days} days to learn from"
        )
    if session.out.json:
        session.out.document(
            {
                "schema": "ltpctl/prune/1",
                "before": moment(before),
                "runs": pruned.runs,
                "verdicts": pruned.verdicts,
                "measurements": pruned.measurements,
            }
        )
        return Exit.OK
    removed = ", ".join(
        (
            _count(pruned.runs, "run"),
            _count(pruned.verdicts, "verdict"),
            _count(pruned.measurements, "measurement"),
        )
    )
    session.out.line(f"removed from before {moment(before)}: {removed}")
    return Exit.OK


@frame.command(
    app,
    "set-state",
    example="ltpctl inventory set-state node017 held --reason 'memory on order'",
)
def set_state(
    session: Session,
    nodes: Annotated[str, typer.Argument(metavar="SET", help="node set and groups: 'rack1,node[200-210]'")],
    state: Annotated[str, typer.Argument(metavar="STATE", help="the state to put them in")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="why; kept in the ledger")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would change")] = False,
) -> Exit:
    """Put nodes in another state by hand; all of them or, if the lifecycle forbids it for one, none."""
    from inventory import lifecycle
    from inventory.errors import UsageError
    from ltpctl.actor import actor

    target = lifecycle.parse(state)
    if not reason.strip():
        raise UsageError("--reason: say why, in a few words")
    fleet = session.fleet
    chosen = set(fleet.names(nodes))
    names = [name for name in fleet.nodes if name in chosen]
    if not names:
        raise UsageError(f"'{nodes}' chooses no node")
    if dry_run:
        with session.ledger(read_only=True) as ledger:
            before = ledger.states(names)
        for name in names:
            _check_way(name, before[name].state, target)
    else:
        with session.ledger() as ledger, ledger.transaction() as tx:
            before = tx.states(names)
            for name in names:
                _check_way(name, before[name].state, target)
                tx.transition(name, target, actor(), reason.strip(), {"by": "set-state"})
    if session.out.json:
        session.out.document(
            {
                "schema": "ltpctl/set-state/1",
                "applied": not dry_run,
                "nodes": [{"node": name, "from": before[name].state, "to": target} for name in names],
            }
        )
        return Exit.OK
    _show_changes(session, names, before, target, dry_run)
    return Exit.OK


@frame.command(
    app,
    "import",
    example="""
    ltpctl inventory import ansible:hosts.ini --output cluster.yaml
    ltpctl inventory import slurm: --output cluster.yaml
    ltpctl inventory import ssh-config:~/.ssh/config
    """,
    globals_=("verbose", "no_color"),
)
def import_(
    session: Session,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="KIND:PATH, or a path whose kind is recognised")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="instead of stdout")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace FILE if it exists")] = False,
) -> Exit:
    """Write another kind of inventory as cluster.yaml, equal nodes folded into ranges."""
    from pathlib import Path

    from inventory.errors import UsageError
    from inventory.sources import load
    from inventory.sources.cluster_text import to_yaml
    from ltpctl.reports.files import write_whole

    fleet = load(source)
    text = to_yaml(fleet)
    if output is None:
        session.out.stdout.write(text)
        return Exit.OK
    path = Path(output)
    try:
        if force and path.is_file():
            # A link goes on pointing to what is replaced.
            write_whole(path.resolve(), text)
        else:
            # What exists and is no file is a device or a pipe: there is nothing to keep.
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        raise UsageError(f"{output} exists; give another name, or --force to replace it") from None
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    session.out.note(f"{_count(len(fleet), 'node')} from {fleet.source} written to {output}")
    return Exit.OK


def _states(session: Session, nodes: Sequence[Node]) -> dict[str, NodeState]:
    with session.ledger(read_only=True) as ledger:
        return ledger.states([node.name for node in nodes])


def _check_way(name: str, source: str, target: str) -> None:
    from inventory import lifecycle

    try:
        lifecycle.transition(source, target)
    except lifecycle.IllegalTransition as error:
        raise lifecycle.IllegalTransition(f"{name}: {error}; nothing was changed") from None


def _show_changes(
    session: Session, names: Sequence[str], before: Mapping[str, NodeState], target: str, dry_run: bool
) -> None:
    from inventory.fleet import fold

    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(before[name].state, []).append(name)
    for source, same in alike.items():
        verb = "would go" if dry_run else "went"
        session.out.line(f"{fold(same)}: {verb} from {source} to {target}")


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "time": moment(event.time),
        "kind": event.kind,
        "from": event.source,
        "to": event.target,
        "actor": event.actor,
        "reason": event.reason,
        "run": event.run,
        "evidence": dict(event.evidence),
    }


def _happening(event: Event) -> str:
    return f"{event.source} -> {event.target}" if event.target is not None else event.kind


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _in_words(value: object) -> str:
    match value:
        case dict():
            return ", ".join(f"{key}: {_in_words(item)}" for key, item in value.items() if item is not None)
        case list():
            return ", ".join(_in_words(item) for item in value)
        case _:
            return str(value)
