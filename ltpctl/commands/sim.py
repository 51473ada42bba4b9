"""``ltpctl sim``: a simulated fleet to try plans, limits and policies on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ltpctl import frame
from ltpctl.exits import Exit
from ltpctl.frame import Session

if TYPE_CHECKING:
    from pathlib import Path

    from probes.simulate.scenario import Scenario
    from probes.simulate.server import Served

app = frame.app("A simulated fleet on loopback addresses, with faults by configuration.")


@frame.command(
    app,
    "start",
    example="""
    ltpctl sim start --nodes 'node[001-064]' --fault 'node017=ecc_uncorrectable' --dir ./sim
    ltpctl validate nodes --quick --config ./sim/config.yaml     # in another terminal
    """,
    globals_=("json", "verbose", "no_color"),
)
def start(
    session: Session,
    scenario: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="scenario file (schema ltpctl/sim/1)")
    ] = None,
    nodes: Annotated[str | None, typer.Option("--nodes", "-n", metavar="SET", help="node set, instead of the file's")] = None,
    sku: Annotated[str | None, typer.Option("--sku", help="SKU profile of every node")] = None,
    fault: Annotated[
        list[str] | None, typer.Option("--fault", "-f", metavar="SET=KIND", help="plant a fault; repeatable")
    ] = None,
    folder: Annotated[
        str, typer.Option("--dir", "-d", metavar="DIR", help="where config, inventory and keys are written")
    ] = "sim",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port of every node; 0 takes a free one")] = 0,
) -> Exit:
    """Serve a fleet until Ctrl-C: real SSH on 127.101.x.y, real agent records, planted faults.

    Writes a configuration that points every command at it: use --config DIR/config.yaml.
    """
    import asyncio
    from pathlib import Path

    from probes.simulate.scenario import ScenarioFile, build, read_scenario

    if scenario is not None:
        chosen = read_scenario(Path(scenario))
        if nodes or sku or fault:
            from inventory.errors import UsageError

            raise UsageError("give either a scenario file, or --nodes, --sku and --fault")
    else:
        given = {"nodes": nodes, "sku": sku, "faults": [_fault(one) for one in fault or ()]}
        chosen = build(ScenarioFile.model_validate({"schema": "ltpctl/sim/1"} | {k: v for k, v in given.items() if v}))
    try:
        asyncio.run(_serve(session, chosen, Path(folder).absolute(), port))
    except KeyboardInterrupt:
        session.out.note("the fleet is gone")
    return Exit.OK


@frame.command(app, "faults", example="ltpctl sim faults", globals_=("json", "verbose", "no_color"))
def faults(session: Session) -> Exit:
    """The kinds of fault that can be planted."""
    from probes.simulate.scenario import fault_kinds

    kinds = fault_kinds()
    if session.out.json:
        session.out.document(
            {"schema": "ltpctl/sim-faults/1", "kinds": [{"kind": k, "what": f.what} for k, f in kinds.items()]}
        )
    else:
        session.out.table(("kind", "what"), ((k, f.what) for k, f in kinds.items()), wrap=frozenset({"what"}))
    return Exit.OK


def _fault(text: str) -> dict[str, str]:
    from inventory.errors import UsageError

    where, found, kind = text.rpartition("=")
    if not found or not where:
        raise UsageError(f"--fault {text!r}: expected SET=KIND, such as node017=ecc_uncorrectable")
    return {"nodes": where, "kind": kind}


async def _serve(session: Session, scenario: Scenario, folder: Path, port: int) -> None:
    import asyncio

    from probes.simulate.fleet import simulated_nodes
    from probes.simulate.server import serve

    async with serve(simulated_nodes(scenario), port) as served:
        _write(folder, scenario, served)
        if session.out.json:
            session.out.document(
                {
                    "schema": "ltpctl/sim-started/1",
                    "config": str(folder / "config.yaml"),
                    "nodes": len(scenario.nodes),
                    "faulty": sorted(scenario.faults),
                    "port": served.port,
                }
            )
        else:
            session.out.line(f"{len(scenario.nodes)} nodes, {len(scenario.faults)} with faults, port {served.port}")
            session.out.line(f"try: ltpctl validate nodes --quick --config {folder / 'config.yaml'}")
            session.out.note("Ctrl-C ends the fleet")
        session.out.stdout.flush()
        await asyncio.Event().wait()


def _write(folder: Path, scenario: Scenario, served: Served) -> None:
    """Write what points the other commands at the fleet. The key opens nothing but these servers."""
    import os

    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "id_ed25519"
    key.unlink(missing_ok=True)
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(served.client_key)
    (folder / "known_hosts").write_text(f"[127.101.*]:{served.port} {served.host_key}\n")
    inventory = {
        "cluster": "simulated",
        "defaults": {"user": "sim", "port": served.port, "sku": scenario.sku, "identity": str(key)},
        "nodes": {name: {"address": address} for name, address in served.addresses.items()},
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(inventory, sort_keys=False))
    config = {
        "inventory": str(folder / "cluster.yaml"),
        "state_dir": str(folder / "state"),
        "ssh": {"config": [], "known_hosts": [str(folder / "known_hosts")]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
