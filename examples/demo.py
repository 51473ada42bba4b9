"""``make demo``: validate this machine, then a simulated fleet with planted faults. Nothing to configure.

Everything it makes lies in ``.demo/``; it leaves no process behind.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".demo"
LTPCTL = [str(Path(sys.executable).with_name("ltpctl"))]
PLANTED = (
    "node017=ecc_uncorrectable",
    "node023=accelerator_missing",
    "node040=driver_skew",
    "node051=slow_gemm",
    "node058=refuse",
)
EXPECTED = {"healthy": 59, "degraded": 2, "unhealthy": 2, "unknown": 1}


def say(text: str) -> None:
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def ltpctl(*arguments: str) -> int:
    print(f"$ ltpctl {' '.join(arguments)}".replace(f"{ROOT}/", ""), flush=True)
    return subprocess.run([*LTPCTL, *arguments], check=False).returncode


@contextlib.contextmanager
def simulated_fleet() -> Iterator[str]:
    """64 simulated nodes; gives the configuration that points at them."""
    faults = [word for planted in PLANTED for word in ("--fault", planted)]
    command = [*LTPCTL, "sim", "start", "--nodes", "node[001-064]", "--dir", str(FOLDER / "sim"), "--json"]
    fleet = subprocess.Popen([*command, *faults], stdout=subprocess.PIPE, text=True)
    try:
        assert fleet.stdout
        text = line = ""
        # The document is indented: only its last line begins with the brace.
        while not line.startswith("}"):
            line = fleet.stdout.readline()
            if not line:
                raise SystemExit("the simulated fleet did not start")
            text += line
        yield str(json.loads(text)["config"])
    finally:
        fleet.send_signal(signal.SIGINT)
        fleet.wait(10)


def counted(config: str) -> dict[str, int]:
    """Verdicts of the last run, as the ledger has them."""
    command = [*LTPCTL, "validate", "runs", "--limit", "1", "--json", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)["runs"][0]["summary"]
    return {verdict: summary[verdict] for verdict in EXPECTED}


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    say("1. This machine: may it be given to a job?")
    state = ("--state-dir", str(FOLDER / "state"))
    here = ltpctl("validate", "nodes", "--standard", *state, "--html", str(FOLDER / "this-machine.html"))
    say("2. A simulated fleet of 64 nodes; five of them have something wrong")
    with simulated_fleet() as config:
        report = ("--html", str(FOLDER / "fleet.html"))
        fleet = ltpctl("validate", "nodes", "--standard", "--apply", "--config", config, *report)
        say("3. What the ledger now says of a bad node")
        ltpctl("inventory", "history", "node017", "--config", config)
        found = counted(config)
    say("Done")
    print(
        f"reports: {FOLDER / 'this-machine.html'}\n         {FOLDER / 'fleet.html'}".replace(f"{ROOT}/", "")
    )
    if here not in (0, 1):
        print(f"this machine could not be judged (exit status {here})")
    if fleet != 1 or found != EXPECTED:
        print(f"the planted faults were not found: exit status {fleet}, {found} instead of {EXPECTED}")
    return 0 if here in (0, 1) and fleet == 1 and found == EXPECTED else 1


if __name__ == "__main__":
    sys.exit(main())
