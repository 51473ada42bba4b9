"""What is measured of ours: one command on every node through the transport, nothing else around it.

``python -m benchmarks.fanout.ours HOSTS_FILE PORT USER KEY KNOWN_HOSTS CONCURRENCY COMMAND...``
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from inventory.fleet import Node
from inventory.transport import Command
from inventory.transport.fanout import fan_out
from inventory.transport.settings import SshSettings
from inventory.transport.ssh import SshTransport


async def main() -> int:
    hosts, port, user, key, known_hosts, concurrency, *argv = sys.argv[1:]
    settings = SshSettings(known_hosts=(known_hosts,), config_files=(), identities=(key,), agent=False)
    work = [
        (Node(host, user=user, port=int(port)), Command(tuple(argv)))
        for host in Path(hosts).read_text().split()
    ]
    failures = 0
    async with SshTransport(settings) as transport:
        async for outcome in fan_out(transport, work, concurrency=int(concurrency)):
            failures += not outcome.ok
            sys.stdout.write(f"{outcome.node}: {outcome.stdout.decode()}{outcome.message}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        sys.exit(asyncio.run(main()))
    sys.exit(uvloop.run(main()))
