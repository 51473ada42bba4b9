"""Nodes as network namespaces on one bridge, each behind an interface of a limited rate.

Ranks of one node share its namespace, so that they talk over its loopback; everything between nodes leaves
through `eth0`. Needs root, iproute2 and the kernel's tbf queue.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

INTERFACE = "eth0"
_PREFIX = "ltpx"


@dataclass(frozen=True)
class Node:
    namespace: str
    address: str


@contextlib.contextmanager
def nodes(count: int, rate: str) -> Iterator[list[Node]]:
    """`rate`: of each node's interface and direction, as tc spells it (`200mbit`).

    The namespaces are gone afterwards, also on Ctrl-C and SIGTERM; those of a run that was killed are
    removed by the next. SystemExit with one line where this cannot work.
    """
    _require()
    _remove_leftovers()
    made: list[str] = []
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        link = _add(made, "link")
        _ip("-n", link, "link", "add", "bridge", "type", "bridge")
        _ip("-n", link, "link", "set", "bridge", "up")
        yield [_join(made, link, number, rate) for number in range(count)]
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "del", name], check=False)
        signal.signal(signal.SIGTERM, before)


def _require() -> None:
    if os.geteuid() != 0:
        raise SystemExit("benchmarks.exchange makes network namespaces: run it as root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"benchmarks.exchange needs {' and '.join(missing)} (on Debian: apt install iproute2)"
        )


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _remove_leftovers() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "netns", "del", name], check=False)


def _add(made: list[str], name: str) -> str:
    namespace = f"{_PREFIX}{os.getpid()}-{name}"
    made.append(namespace)
    _ip("netns", "add", namespace)
    # Neighbour discovery of IPv6 would be counted as traffic.
    _run("ip", "netns", "exec", namespace, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", check=False)
    _ip("-n", namespace, "link", "set", "lo", "up")
    return namespace


def _join(made: list[str], link: str, number: int, rate: str) -> Node:
    namespace, port = _add(made, f"node{number}"), f"port{number}"
    _ip("-n", link, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    _ip("-n", link, "link", "set", port, "master", "bridge", "up")
    node = Node(namespace, f"10.213.0.{number + 1}")
    _ip("-n", namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
    _ip("-n", namespace, "link", "set", INTERFACE, "up")
    for where, device in ((namespace, INTERFACE), (link, port)):
        # A queue long enough that nothing is dropped: what TCP sends again would be counted twice.
        _run(
            "tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf",
            "rate", rate, "burst", "128kb", "limit", "32mb",
        )  # fmt: skip
    return node


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
