"""One real sshd that answers on every 127.x.y.z of a network namespace made for the benchmark."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PORT = 2222


@dataclass(frozen=True)
class Sshd:
    pid: int
    user: str
    key: Path
    known_hosts: Path
    client_config: Path

    def cpu_seconds(self) -> float:
        """CPU of sshd and of every session that has ended."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def in_own_network() -> None:
    """Run the rest of this program in a new network namespace with only a loopback interface. Needs root."""
    if os.environ.get("LTP_BENCH_NETNS"):
        return
    if os.geteuid() != 0:
        raise SystemExit("benchmarks.fanout makes a network namespace and runs sshd: run it as root")
    os.environ["LTP_BENCH_NETNS"] = "1"
    script = 'ip link set lo up; sysctl -qw net.core.somaxconn=8192; exec "$@"'
    os.execvp(
        "unshare",
        [
            "unshare",
            "--net",
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            "-m",
            "benchmarks.fanout",
            *sys.argv[1:],
        ],
    )


def addresses(count: int) -> list[str]:
    return [f"127.1.{i // 250}.{i % 250 + 1}" for i in range(count)]


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[Sshd]:
    """Start sshd; the login is an ordinary user made for it, if there is none yet."""
    user = "ltpbench"
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True)
    try:
        pwd.getpwnam(user)
    except KeyError:
        subprocess.run(["useradd", "--no-create-home", "--shell", "/bin/sh", user], check=True)
    subprocess.run(["usermod", "--home", str(home), "--password", "*", user], check=True)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    authorized = folder / "authorized_keys"
    shutil.copy(folder / "client.pub", authorized)
    folder.chmod(0o755)
    config = folder / "sshd_config"
    config.write_text(
        f"Port {PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {authorized}\nPidFile {folder}/pid\n"
        "UsePAM no\nUseDNS no\n"
        "StrictModes no\nMaxStartups 4096\nPerSourceMaxStartups none\nMaxSessions 1024\nLogLevel ERROR\n"
        "PasswordAuthentication no\nPrintMotd no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(f"[127.*]:{PORT} {(folder / 'host.pub').read_text()}")
    client_config = folder / "ssh_config"
    client_config.write_text(
        f"Host *\n Port {PORT}\n User {user}\n IdentityFile {folder}/client\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {known_hosts}\n GlobalKnownHostsFile none\n LogLevel ERROR\n BatchMode yes\n"
    )
    server = subprocess.Popen(
        [shutil.which("sshd", path="/usr/sbin:/usr/bin") or "sshd", "-D", "-f", str(config)],
        preexec_fn=_adopt_orphans,  # noqa: PLW1509 - there are no threads
    )
    try:
        _wait_for_port(server)
        yield Sshd(server.pid, user, folder / "client", known_hosts, client_config)
    finally:
        server.terminate()
        server.wait(10)


def _adopt_orphans() -> None:
    """When a client hangs up, sshd's process for the connection ends before the one for the user's session:
    its CPU, with that of the command, would else be counted to init."""
    subreaper = 36  # PR_SET_CHILD_SUBREAPER; it lasts over exec
    if ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _wait_for_port(server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if server.poll() is not None:
            raise SystemExit("sshd did not start")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("sshd does not listen")
