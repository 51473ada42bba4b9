"""``make demo``: validate this machine, then a simulated fleet with planted faults. Nothing to configure.

Everything it makes lies in ``.demo/``; it leaves no process behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".demo"
LTPCTL = [str(Path(sys.executable).with_name("ltpctl"))]
PLANTED = [
    "node017=ecc_uncorrectable",
    "node023=accelerator_missing",
    "node040=driver_skew",
    "node051=slow_gemm",
    "node058=refuse",
]


def say(text: str) -> None:
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def ltpctl(*arguments: str) -> int:
    print(f"$ ltpctl {' '.join(arguments)}".replace(f"{ROOT}/", ""), flush=True)
    return subprocess.run([*LTPCTL, *arguments], check=False).returncode


@contextlib.contextmanager
def simulated_fleet() -> Iterator[Path]:
    """64 simulated nodes; gives the configuration that points at them."""
    faults = [word for planted in PLANTED for word in ("--fault", planted)]
    command = [
        *LTPCTL,
        "sim",
        "start",
        "--nodes",
        "node[001-064]",
        "--dir",
        str(FOLDER / "sim"),
        "--json",
        *faults,
    ]
    fleet = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert fleet.stdout
        text = ""
        while not text.rstrip().endswith("}"):
            line = fleet.stdout.readline()
            if not line:
                raise SystemExit("the simulated fleet did not start")
            text += line
        yield Path(json.loads(text)["config"])
    finally:
        fleet.send_signal(signal.SIGINT)
        fleet.wait(10)


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.environ["LTP_STATE_DIR"] = str(FOLDER / "state")
    say("1. This machine: may it be given to a job?")
    here = ltpctl("validate", "nodes", "--standard", "--html", str(FOLDER / "this-machine.html"))
    say("2. A simulated fleet of 64 nodes; five of them have something wrong")
    del os.environ["LTP_STATE_DIR"]
    with simulated_fleet() as config:
        fleet = ltpctl(
            "validate",
            "nodes",
            "--standard",
            "--apply",
            "--config",
            str(config),
            "--html",
            str(FOLDER / "fleet.html"),
        )
        say("3. What the ledger now says of a bad node")
        ltpctl("inventory", "history", "node017", "--config", str(config))
    say("Done")
    print(
        f"reports: {FOLDER / 'this-machine.html'}\n         {FOLDER / 'fleet.html'}".replace(f"{ROOT}/", "")
    )
    named = fleet == 1 and here in (0, 1, 3)
    return 0 if named else 1


if __name__ == "__main__":
    sys.exit(main())
