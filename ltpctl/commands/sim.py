"""``ltpctl sim``: a simulated fleet to try plans, limits and policies on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ltpctl import frame
from ltpctl.exits import Exit
from ltpctl.frame import Session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from probes.simulate.node import SimulatedNode
    from probes.simulate.scenario import Scenario
    from probes.simulate.workplace import Workplace

app = frame.app("A simulated fleet on loopback addresses, with faults by configuration.")


@frame.command(
    app,
    "start",
    example="""
    ltpctl sim start --nodes 'node[001-064]' --fault node017=ecc_uncorrectable
    ltpctl sim start --nodes 'n[1-2048]' --sku mi300x -f 'n[7,9]=refuse' --dir fleet
    ltpctl sim start examples/sim/small.yaml
    ltpctl validate nodes --quick --config sim/config.yaml     # in another terminal
    """,
    globals_=("json", "verbose", "no_color"),
)
def start(
    session: Session,
    *,
    scenario: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="scenario file (schema ltpctl/sim/1)")
    ] = None,
    nodes: Annotated[
        str | None, typer.Option("--nodes", "-n", metavar="SET", help="node set; default node[001-016]")
    ] = None,
    sku: Annotated[
        str | None, typer.Option("--sku", help="SKU profile of every node; default h100-sxm")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", "-f", metavar="SET=KIND", help="plant a fault ('sim faults'); repeatable"),
    ] = None,
    folder: Annotated[
        str, typer.Option("--dir", "-d", metavar="DIR", help="where config, inventory and keys are written")
    ] = "sim",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="port of every node; 0 takes a free one")
    ] = 0,
) -> Exit:
    """Serve a fleet until Ctrl-C: real SSH on 127.101.x.y, answers as of the probe agent, planted faults.

    Writes a configuration into DIR that points every other command at it: --config DIR/config.yaml. With
    --json, prints one document as soon as the nodes answer.
    """
    from pathlib import Path

    from inventory.errors import UsageError
    from probes.simulate.scenario import read_scenario

    if scenario is None:
        chosen = _from_options(nodes, sku, fault)
    elif nodes or sku or fault:
        raise UsageError("give either a scenario file, or --nodes, --sku and --fault")
    else:
        chosen = read_scenario(Path(scenario))
    return _run(session, chosen, Path(folder).absolute(), port)


@frame.command(
    app,
    "faults",
    example="ltpctl sim faults\nltpctl sim faults --json",
    globals_=("json", "verbose", "no_color"),
)
def faults(session: Session) -> Exit:
    """The kinds of fault that can be planted."""
    from probes.simulate.scenario import fault_kinds

    kinds = fault_kinds()
    if session.out.json:
        rows = [{"kind": kind, "what": fault.what} for kind, fault in kinds.items()]
        session.out.document({"schema": "ltpctl/sim-faults/1", "kinds": rows})
    else:
        session.out.table(("kind", "what"), ((k, f.what) for k, f in kinds.items()), wrap=frozenset({"what"}))
    return Exit.OK


def _from_options(nodes: str | None, sku: str | None, fault: list[str] | None) -> Scenario:
    from probes.simulate.scenario import ScenarioFile, build, parse_planted

    given = {"nodes": nodes, "sku": sku}
    file = ScenarioFile.model_validate(
        {"schema": "ltpctl/sim/1", "faults": parse_planted(fault or ())}
        | {k: v for k, v in given.items() if v}
    )
    return build(file)


def _run(session: Session, scenario: Scenario, folder: Path, port: int) -> Exit:
    """On uvloop where it is installed: one process plays every node, and its CPU is what limits them."""
    from probes.simulate.fleet import simulated_nodes
    from probes.simulate.workplace import workplace

    nodes = simulated_nodes(scenario)
    with workplace(folder) as place:
        work = _serve(session, scenario, nodes, place, port)
        try:
            import uvloop
        except ImportError:
            import asyncio

            asyncio.run(work)
        else:
            uvloop.run(work)
    return Exit.OK


async def _serve(
    session: Session, scenario: Scenario, nodes: Mapping[str, SimulatedNode], place: Workplace, port: int
) -> None:
    import asyncio
    import os
    import shlex
    import signal

    from probes.simulate.server import serve

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve(nodes, port) as served:
        config = place.write(scenario, served)
        if session.out.json:
            session.out.document(
                {
                    "schema": "ltpctl/sim-started/1",
                    "config": str(config),
                    "nodes": len(nodes),
                    "faulty": sorted(scenario.faults),
                    "port": served.port,
                }
            )
        else:
            session.out.line(f"{len(nodes)} nodes, {len(scenario.faults)} with faults, port {served.port}")
            # Variables go before a configuration file: they would point the command at somebody's real nodes.
            unset = "".join(f"-u {name} " for name in sorted(os.environ) if name.startswith("LTP_"))
            command = f"ltpctl validate nodes --quick --config {shlex.quote(str(config))}"
            session.out.line(f"try: {'env ' + unset if unset else ''}{command}")
            session.out.note("Ctrl-C ends the fleet")
        session.out.stdout.flush()
        await stop.wait()
    session.out.note("the fleet has ended")
