"""A controller that tests may interrupt, freeze and kill: runs one command and prints how it ended.

On stdin: a JSON object with host, port, known_hosts, identity, argv, limit, and optionally `local`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

from inventory.fleet import Node
from inventory.transport import Command, Limits, transport_for
from inventory.transport.settings import SshSettings


async def main(request: dict[str, object]) -> None:
    settings = SshSettings(
        known_hosts=(str(request["known_hosts"]),),
        config_files=(),
        identities=(str(request["identity"]),),
        agent=False,
    )
    node = Node(name="node", address=str(request["host"]), port=int(str(request["port"])))
    node = replace(node, local=bool(request.get("local")))
    command = Command(tuple(request["argv"]), limits=Limits(command=float(str(request["limit"]))))  # type: ignore[arg-type]
    counted = 0

    def count(name: str, data: bytes) -> None:
        nonlocal counted
        counted += len(data)

    async with transport_for([node], settings) as transport:
        outcome = await transport.run(node, command, count if request.get("stream") else None)
    # Not getrusage: its peak is that of whoever started this program, if that was larger.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    answer = {
        "ending": outcome.ending,
        "phase": outcome.phase,
        "kept": len(outcome.stdout),
        "streamed": counted,
    }
    print(
        json.dumps({**answer, "truncated": outcome.truncated, "seconds": outcome.seconds, "peak_kib": peak})
    )


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
