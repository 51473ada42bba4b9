"""A rank that trains until it is told to end; a program for a test to run.

MODE `stuck`: the main thread sits in a collective that never completes. `loops`: it looks at `stopping`.
`loops-never`: it does so, and
the copy never begins. Prints the version when it is in the middle of a step.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ltf.checkpoint.pieces import Piece
from ltf.checkpoint.saver import LeaveTraining, Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Checkpoint


class Never(State):
    def pieces(self) -> list[Piece]:
        threading.Event().wait()
        return super().pieces()


def main(folder: Path, mode: str, grace: float) -> int:
    dist.init_process_group("gloo")
    weights = nn.Linear(8, 8)
    with torch.no_grad():
        weights.weight.fill_(3.0)
    state = (Never if mode == "loops-never" else State)([weights])
    settings = Checkpoint(grace_seconds=grace)
    with Saver(Store(folder), state, settings, config={}, leave_seconds=0.5, insist_seconds=0.4) as saver:
        saver.finished_update(3, {"step": 3})
        print("in a step", flush=True)
        match mode:
            case "stuck":
                dist.recv(torch.zeros(1), src=(dist.get_rank() + 1) % dist.get_world_size())
            case _:
                while not saver.stopping:
                    time.sleep(0.01)
    print("closed", flush=True)
    return saver.stop_status


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
    except LeaveTraining as leave:
        sys.exit(leave.status)
