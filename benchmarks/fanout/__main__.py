"""Fan-out, side by side in one run, as root: ``python -m benchmarks.fanout --nodes 64,256,1024``.

Reports for each tool: wall time, client CPU a node, nodes that answered; and the CPU that sshd itself needed,
which on one machine bounds the wall time of everybody. The tools that use OpenSSH are run with curve25519,
the exchange that all of them can speak, and once more with OpenSSH's default.

``--quick-plan`` measures `benchmarks.fanout.quick_plan` instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.fanout.servers import PORT, Sshd, addresses, in_own_network, sshd

AT_ONCE = 64
ANSWER = "answer-42"
ECHO = f"echo {ANSWER}"


@dataclass(frozen=True)
class Row:
    tool: str
    nodes: int
    wall_s: float
    client_ms_a_node: float
    server_ms_a_node: float
    answered: int
    peak_mb: float


Tool = Callable[[Sshd, list[str], Path], list[str]]


def _ours(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.fanout.ours", str(folder / "hosts"), str(PORT), server.user,
        str(server.key), str(server.known_hosts), str(AT_ONCE), "echo", ANSWER,
    ]  # fmt: skip


def _pdsh(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    os.environ["PDSH_SSH_ARGS"] = f"-F {server.client_config} -oKexAlgorithms=curve25519-sha256 -l %u %h"
    return ["pdsh", "-R", "ssh", "-f", str(AT_ONCE), "-l", server.user, "-w", f"^{folder / 'hosts'}", ECHO]


def _clush(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    options = f"-F {server.client_config} -oKexAlgorithms=curve25519-sha256"
    return ["clush", "--hostfile", str(folder / "hosts"), "-f", str(AT_ONCE), "-o", options, "-n", ECHO]


def _xargs(kex: str) -> Tool:
    def command(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
        script = f'xargs -a "$1" -P {AT_ONCE} -I{{}} ssh -n -F "$2" {kex} {{}} {ECHO}'
        return ["sh", "-c", script, "sh", str(folder / "hosts"), str(server.client_config)]

    return command


def _parallel_ssh(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    program = (
        "import sys; from pssh.clients import ParallelSSHClient\n"
        "hosts = open(sys.argv[1]).read().split()\n"
        f"client = ParallelSSHClient(hosts, user=sys.argv[2], pkey=sys.argv[3], port={PORT},\n"
        f" pool_size={AT_ONCE}, allow_agent=False)\n"
        f"for host in client.run_command({ECHO!r}):\n    print(host.host, *host.stdout)\n"
    )
    return [_peers_python("parallel-ssh"), "-c", program, str(folder / "hosts"), server.user, str(server.key)]


def _ansible(server: Sshd, hosts: list[str], folder: Path) -> list[str]:
    inventory = folder / "ansible.ini"
    inventory.write_text("\n".join(hosts) + "\n")
    os.environ["ANSIBLE_SSH_ARGS"] = f"-F {server.client_config} -oKexAlgorithms=curve25519-sha256"
    return [
        _peers_program("ansible"), "all", "-i", str(inventory), "-f", str(AT_ONCE), "-m", "raw", "-a", ECHO,
        "-u", server.user,
    ]  # fmt: skip


TOOLS: dict[str, tuple[Tool, int]] = {
    "ltpctl transport": (_ours, 10_000),
    "pdsh": (_pdsh, 10_000),
    "clush": (_clush, 10_000),
    "parallel-ssh": (_parallel_ssh, 10_000),
    "xargs -P ssh": (_xargs("-oKexAlgorithms=curve25519-sha256"), 10_000),
    "xargs -P ssh, OpenSSH's default exchange": (_xargs(""), 256),
    "Ansible raw": (_ansible, 256),
}
"""Tool -> its command line, and the most nodes it is tried on (the slow ones would take the whole time)."""


def _peers_program(name: str) -> str:
    """A peer installed by pip may live in its own environment, named by PEERS (a venv's bin folder)."""
    return shutil.which(name, path=f"{os.environ.get('PEERS', '')}:{os.environ['PATH']}") or name


def _peers_python(package: str) -> str:
    folder = os.environ.get("PEERS")
    return f"{folder}/python" if folder else sys.executable


def measure(
    tool: str,
    command: Sequence[str],
    nodes: int,
    server: Sshd,
    sent: Path = Path(os.devnull),
    answers: Callable[[str], int] = lambda text: len(re.findall(ANSWER, text)),
) -> Row | None:
    """One run of `command` with the file `sent` as its stdin. None: the tool is not installed."""
    before_server, started = server.cpu_seconds(), time.perf_counter()
    with tempfile.TemporaryFile() as output, sent.open("rb") as stdin:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, stdin=stdin)
        except FileNotFoundError:
            return None
        _, _, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        output.seek(0)
        text = output.read().decode(errors="replace")
    time.sleep(0.5)
    client = usage.ru_utime + usage.ru_stime
    server_cpu = server.cpu_seconds() - before_server
    answered = answers(text)
    if answered < nodes:
        print(f"{tool}: {answered} of {nodes} answered; {text[-300:]!r}", file=sys.stderr)
    return Row(
        tool, nodes, wall, 1000 * client / nodes, 1000 * server_cpu / nodes, answered, usage.ru_maxrss / 1024
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", help="default 64,256,1024; with --quick-plan 64,256")
    parser.add_argument("--quick-plan", action="store_true", help="whole validations instead of one echo")
    parser.add_argument(
        "--rounds", type=int, default=3, help="medians of so many rounds, the tools taking turns"
    )
    parser.add_argument("--only", help="tools whose name contains this")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    in_own_network()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    if options.quick_plan:
        from benchmarks.fanout.quick_plan import compare

        compare([int(n) for n in (options.nodes or "64,256").split(",")])
        return
    medians: list[Row] = []
    print(_HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with sshd(folder) as server:
            for nodes in map(int, (options.nodes or "64,256,1024").split(",")):
                hosts = addresses(nodes)
                (folder / "hosts").write_text("\n".join(hosts) + "\n")
                rows: dict[str, list[Row]] = {}
                for _ in range(options.rounds):
                    for tool, (command, most) in TOOLS.items():
                        if nodes <= most and (not options.only or options.only in tool):
                            row = measure(tool, command(server, hosts, folder), nodes, server)
                            if row:
                                rows.setdefault(tool, []).append(row)
                for several in rows.values():
                    medians.append(_median(several))
                    _show(medians[-1])
                for tool, (_, most) in TOOLS.items():
                    if tool not in rows and nodes <= most and (not options.only or options.only in tool):
                        print(f"| {tool} | {nodes} | not installed | | | |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in medians], indent=1) + "\n")


def _median(rows: Sequence[Row]) -> Row:
    first = rows[0]
    return Row(
        first.tool,
        first.nodes,
        statistics.median(r.wall_s for r in rows),
        statistics.median(r.client_ms_a_node for r in rows),
        statistics.median(r.server_ms_a_node for r in rows),
        min(r.answered for r in rows),
        max(r.peak_mb for r in rows),
    )


_HEAD = (
    "| tool | nodes | answered | wall s | client CPU ms a node | server CPU ms a node | client peak MB |\n"
    "|---|---|---|---|---|---|---|"
)


def _show(row: Row) -> None:
    print(
        f"| {row.tool} | {row.nodes} | {row.answered} | {row.wall_s:.1f} | {row.client_ms_a_node:.1f} "
        f"| {row.server_ms_a_node:.1f} | {row.peak_mb:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
