"""A fan-out within the open files that a process may have. Limits are lowered in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import asyncio, json, os, resource, sys
from inventory.fleet import Node
from inventory.transport import Command, Ending, Outcome, Phase
from inventory.transport.fanout import fan_out

soft, hard, concurrency = map(int, sys.argv[1:])
_, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, min(hard, ceiling)))


class Holding:
    "Each command holds a file open until nobody else begins."

    def __init__(self):
        self.open = self.most = self.refused = 0

    async def run(self, node, command, on_output=None):
        try:
            file = os.open("/dev/null", os.O_RDONLY)
        except OSError:
            self.refused += 1
            return Outcome(node.name, Ending.FAILED, Phase.CONNECT)
        self.open += 1
        self.most = max(self.most, self.open)
        begun = -1
        while begun != self.open:
            begun = self.open
            await asyncio.sleep(0)
        os.close(file)
        self.open -= 1
        return Outcome(node.name, Ending.EXIT, Phase.COMMAND, status=0)


async def main():
    transport, command = Holding(), Command(("true",))
    work = [(Node(f"n{i}"), command) for i in range(concurrency)]
    done = [outcome async for outcome in fan_out(transport, work, concurrency)]
    print(json.dumps({"done": len(done), "most": transport.most, "refused": transport.refused}))


asyncio.run(main())
"""


def fan_out_with(soft: int, hard: int, concurrency: int) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(concurrency)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def test_the_soft_limit_is_raised_for_a_large_fan_out() -> None:
    assert fan_out_with(256, 1024, 400) == {"done": 400, "most": 400, "refused": 0}


def test_within_a_hard_limit_fewer_are_in_flight_and_none_fails_for_it() -> None:
    said = fan_out_with(200, 200, 400)
    assert (said["done"], said["refused"]) == (400, 0)
    assert 1 < said["most"] < 200
