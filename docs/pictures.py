"""Make the README's pictures from real output: ``make pictures`` (the page needs Chromium).

A simulated fleet is validated by the real program on a pseudo-terminal; what it prints becomes an SVG, its
HTML report a PNG.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).with_name("images")
LTPCTL = str(Path(sys.executable).with_name("ltpctl"))
PLANTED = (
    "node017=ecc_uncorrectable",
    "node023=pcie_width",
    "node[030-031]=driver_skew",
    "node040=silent",
)
COLUMNS, LINES = 124, 60
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1300,1330",
)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        faults = [word for planted in PLANTED for word in ("--fault", planted)]
        start = [LTPCTL, "sim", "start", "--nodes", "node[001-064]", "--dir", str(folder), "--json", *faults]
        fleet = subprocess.Popen(start, stdout=subprocess.PIPE, text=True)
        try:
            config = _config(fleet)
            report = folder / "report.html"
            shown = _on_a_terminal(
                [LTPCTL, "validate", "nodes", "--standard", "--config", config, "--html", str(report)]
            )
        finally:
            fleet.send_signal(signal.SIGINT)
            fleet.wait(10)
        _draw(shown, IMAGES / "validate.svg")
        if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
            target = f"--screenshot={IMAGES / 'report.png'}"
            profile = f"--user-data-dir={folder / 'chromium'}"
            command = [chromium, *CHROMIUM, profile, target, report.as_uri()]
            subprocess.run(command, check=True, capture_output=True)


def _config(fleet: subprocess.Popen[str]) -> str:
    assert fleet.stdout
    text = line = ""
    while not line.startswith("}"):
        line = fleet.stdout.readline()
        text += line
    return str(json.loads(text)["config"])


def _on_a_terminal(command: list[str]) -> str:
    """What the command prints on a terminal of COLUMNS x LINES."""
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    environment.pop("NO_COLOR", None)
    here, there = pty.openpty()
    # Progress goes to stderr; a picture that does not move shows the result alone.
    process = subprocess.Popen(command, stdout=there, stderr=subprocess.DEVNULL, env=environment)
    os.close(there)
    output = b""
    while True:
        try:
            piece = os.read(here, 65536)
        except OSError:  # The other side is closed.
            break
        if not piece:
            break
        output += piece
    process.wait()
    return output.decode()


def _draw(output: str, path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ ltpctl validate nodes --standard", style="bold"))
        console.print(Text.from_ansi(output.replace("\r\n", "\n")))
        path.write_text(console.export_svg(title="64 nodes, five of them faulty"))


if __name__ == "__main__":
    main()
