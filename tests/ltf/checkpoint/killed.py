"""A process that trains and saves without a pause, killed at many instants; a program for a test to run.

Prints one JSON line a kill: what was announced as saved before, and what loads afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ltf.checkpoint.load import Loaded, load
from ltf.checkpoint.saver import Saved, Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Checkpoint


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300_000))


def run(folder: Path, announce: int) -> None:
    """Every element of the state is the version."""
    weights = Weights()
    state = State([weights])
    loaded = load(Store(folder), state, seed=0)
    version = loaded.version if isinstance(loaded, Loaded) else 0
    with Saver(Store(folder), state, Checkpoint(), config={}, signals=False, saved=version) as saver:
        saver.finished_update(version, {"step": version})
        os.write(announce, b"started\n")
        while True:
            saver.before_update()
            version += 1
            with torch.no_grad():
                weights.weight.fill_(float(version))
            saver.finished_update(version, {"step": version})
            saver.request()
            saver.wait()
            for found in saver.poll():
                if isinstance(found, Saved):
                    os.write(announce, f"{found.version}\n".encode())


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    duration = 0.0
    for kill in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            run(folder, write)
        os.close(write)
        data = os.read(read, 64)
        # Some in the first save, the others at any fraction of a later one, however slow this machine is now.
        if kill % 4 == 0 and duration:
            time.sleep(duration * kill / kills)
        else:
            start = time.monotonic()
            data += os.read(read, 64)
            duration = time.monotonic() - start
            time.sleep(duration * (kill * 0.37 % 1.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 4096):
            data += more
        os.close(read)
        announced = [int(line) for line in data.split() if line.isdigit()]
        leftovers = len(list(folder.glob("writing/*/__0_0.distcp")))
        weights = Weights()
        loaded = load(Store(folder), State([weights]), seed=0)
        found = loaded.version if isinstance(loaded, Loaded) else 0
        values = set(weights.weight.tolist())
        report = {
            "announced": announced[-1] if announced else 0,
            "loaded": found,
            "right": values == {float(found)},
            "findings": len(loaded.findings),
            "leftovers": leftovers,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
