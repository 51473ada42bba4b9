"""Writers for the tests that kill them: a warm process that forks one for each line it reads.

A line is a JSON object: `work` (a name of WORK), `url`, `acks` (a file that gets one JSON line for each
acknowledged commit) and what the work needs. The answer is the writer's pid. A line ``{"reap": PID}`` is
answered when that writer has ended.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  (warm: a fresh ledger needs it)
import psycopg  # noqa: F401

from inventory import lifecycle
from inventory.ledger import Ledger, MeasurementRow, StateChanged, VerdictRow, open_ledger

Acknowledge = Callable[..., None]


def endless(ledger: Ledger, acknowledge: Acknowledge, order: dict[str, Any]) -> None:
    """Transitions and batches of verdicts, as fast as they go, until somebody ends it."""
    dice = random.Random(order["seed"])
    run = ledger.begin_run("validate", "quick", "writer", "all")
    acknowledge(run=run)
    batch = 0
    while True:
        node = f"node{dice.randrange(20):03}"
        here = ledger.states([node])[node].state
        event = ledger.transition(
            node,
            dice.choice(sorted(lifecycle.describe(here).ways)),
            "writer",
            "a step",
            {"seed": order["seed"]},
        )
        acknowledge(event=event.id, node=node, target=event.target)
        batch += 1
        names = [f"batch{batch}-{i}" for i in range(dice.randrange(1, 60))]
        with ledger.transaction() as tx:
            tx.record_event(
                "batch", actor="writer", reason="a batch", evidence={"verdicts": len(names)}, run=run
            )
            tx.record_verdicts(
                run,
                [VerdictRow(name, "healthy", "h100", [{"check": "host.x"}] * 3) for name in names],
                [MeasurementRow(name, f"host.x.m{i}", i) for name in names for i in range(10)],
            )
        acknowledge(run=run, verdicts=len(names))


def steps(ledger: Ledger, acknowledge: Acknowledge, order: dict[str, Any]) -> None:
    """A given number of transactions on this writer's own node and on one that all writers share."""
    _wait_for(order["go"])
    own = f"own-{order['seed']}"
    for i in range(order["count"]):
        with ledger.transaction() as tx:
            now = tx.states([own])[own].state
            event = tx.transition(
                own, "validating" if now == "available" else "available", "writer", "step", {}
            )
            counted = len(tx.events(kind="counted"))
            tx.record_event(
                "counted", "shared", actor="writer", reason="step", evidence={"value": counted + 1}
            )
        acknowledge(event=event.id, step=i)


def compare_and_set(ledger: Ledger, acknowledge: Acknowledge, order: dict[str, Any]) -> None:
    """Try to take each node; only one writer may get it."""
    _wait_for(order["go"])
    for node in order["nodes"]:
        try:
            ledger.transition(node, "allocated", f"job-{order['seed']}", "taken", {}, expect="available")
        except StateChanged:
            acknowledge(node=node, lost=True)
        else:
            acknowledge(node=node, won=True)


WORK = {"endless": endless, "steps": steps, "compare_and_set": compare_and_set}


def _wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.001)


def _child(order: dict[str, Any]) -> int:
    sink = os.open(order["acks"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def acknowledge(**facts: object) -> None:
        os.write(sink, (json.dumps(facts) + "\n").encode())

    try:
        with open_ledger(order["url"]) as ledger:
            WORK[order["work"]](ledger, acknowledge, order)
    except Exception as error:  # noqa: BLE001  (every failure is the test's to judge)
        acknowledge(failed=f"{type(error).__name__}: {error}")
        return 1
    return 0


def main() -> None:
    lifecycle.table()
    children: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "reap" in order:
            os.waitpid(order["reap"], 0)
            children.discard(order["reap"])
            print("done", order["reap"], flush=True)
            continue
        child = os.fork()
        if child == 0:
            os._exit(_child(order))
        children.add(child)
        print(child, flush=True)
    for child in children:
        os.kill(child, 9)


if __name__ == "__main__":
    main()
