"""``ltpctl``: the typer app. Commands import what they need when they run, so that this starts at once."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from ltpctl import __version__, frame
from ltpctl.commands import config, doctor, inventory, sim, validate

app = frame.app(
    "Keep a cluster of unreliable accelerators useful: know who the nodes are, validate them, "
    "and give only healthy ones to jobs.",
    epilog="\b\nExit status: 0 fine, 1 findings, 2 usage or configuration, 3 could not be determined,\n"
    "70 ltpctl itself broke, 75 skipped (a lock is held), 130 interrupted.",
)
app.add_typer(validate.app, name="validate")
app.add_typer(inventory.app, name="inventory")
app.add_typer(sim.app, name="sim")
app.add_typer(config.app, name="config")
doctor.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ltpctl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version and leave")
    ] = False,
) -> None:
    """Options of the program itself; every command has its own."""


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A locale or a file name without UTF-8 costs a character, not the answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="ltpctl")
