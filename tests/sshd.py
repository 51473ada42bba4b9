"""A real OpenSSH server on many loopback addresses, with keys and files of its own.

Works as root and as an ordinary user: it listens on high ports of 127.x.y.z, lets in the user who runs the
tests, and touches nothing outside its folder except ``/run/sshd``, which sshd wants when root starts it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from inventory.fleet import Node
from inventory.transport import Retry
from inventory.transport.settings import SshSettings

SSHD = (
    shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or "/usr/sbin/sshd"
)

_ADDRESSES_A_SERVER = 16
"""OpenSSH listens on at most sixteen addresses."""


@dataclass
class Sshd:
    """One server process. `addresses` are the nodes that it plays."""

    folder: Path
    port: int
    addresses: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def identity(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def host_key(self) -> Path:
        return self.folder / "host_ed25519"

    @property
    def log(self) -> Path:
        return self.folder / "sshd.log"

    def node(self, index: int = 0, **attributes: object) -> Node:
        address = self.addresses[index]
        return Node(name=f"node-{address}", address=address, port=self.port, **attributes)  # type: ignore[arg-type]

    def nodes(self) -> list[Node]:
        return [self.node(index) for index in range(len(self.addresses))]

    def settings(self, **changes: object) -> SshSettings:
        """Settings that use this server's files alone: nothing of the person who runs the tests."""
        values: dict[str, object] = {
            "known_hosts": (str(self.known_hosts),),
            "config_files": (),
            "identities": (str(self.identity),),
            "agent": False,
            "retry": Retry(attempts=1),
        }
        return SshSettings(**{**values, **changes})  # type: ignore[arg-type]

    def start(self) -> Sshd:
        configuration = self.folder / "sshd_config"
        configuration.write_text(self._configuration())
        if os.getuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self.process = subprocess.Popen(
            [SSHD, "-D", "-f", str(configuration), "-E", str(self.log)], stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 15
        for address in self.addresses:
            while not _answers(address, self.port):
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, f"sshd does not listen on {address}"
                time.sleep(0.01)
        return self

    def children(self) -> list[psutil.Process]:
        """The server's processes for its sessions, not the listener."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=False)

    def kill(self) -> None:
        """SIGKILL to the listener and to every process that serves a session (not to the commands)."""
        assert self.process is not None
        listener = psutil.Process(self.process.pid)
        serving = [child for child in listener.children(recursive=True) if child.name().startswith("sshd")]
        for process in [listener, *serving]:
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def _configuration(self) -> str:
        options = {
            "Port": str(self.port),
            "HostKey": str(self.host_key),
            "AuthorizedKeysFile": str(self.folder / "authorized_keys"),
            "PidFile": "none",
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "UseDNS": "no",
            "StrictModes": "no",
            "PrintMotd": "no",
            "MaxStartups": "4096",
            "PerSourceMaxStartups": "none",
            "MaxSessions": "1024",
            "LogLevel": "VERBOSE",
            # The shell files of whoever runs the tests are none of the tests' business.
            "SetEnv": f"HOME={self.folder}",
            **self.options,
        }
        listen = [f"ListenAddress {address}" for address in self.addresses]
        return "\n".join([*(f"{name} {value}" for name, value in options.items()), *listen]) + "\n"


def make_key(path: Path, kind: str = "ed25519", comment: str = "test") -> Path:
    """A key pair without a passphrase, made by ssh-keygen."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", comment, "-f", str(path)], check=True)
    return path


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def public(path: Path) -> str:
    """``TYPE BASE64`` of a key's public half."""
    return " ".join(path.with_name(path.name + ".pub").read_text().split()[:2])


StartSshd = Callable[..., Sshd]


def _starter(base: Path, keys: Path) -> Iterator[StartSshd]:
    running: list[Sshd] = []

    def start(
        addresses: int | tuple[str, ...] = 1, prefix: str = "127.70", trusted: bool = True, **options: str
    ) -> Sshd:
        folder = base / f"sshd{len(running)}"
        folder.mkdir()
        index = len(running)
        if isinstance(addresses, int):
            assert addresses <= _ADDRESSES_A_SERVER
            addresses = tuple(f"{prefix}.{index}.{number}" for number in range(1, addresses + 1))
        port = free_port(addresses[0])
        server = Sshd(folder, port, addresses, options)
        for name in ("host_ed25519", "host_ed25519.pub", "id_ed25519", "id_ed25519.pub"):
            shutil.copy(keys / name, folder / name)
        shutil.copy(keys / "id_ed25519.pub", folder / "authorized_keys")
        lines = [f"[{address}]:{port} {public(server.host_key)}\n" for address in addresses]
        server.known_hosts.write_text("".join(lines) if trusted else "")
        running.append(server)
        return server.start()

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def ssh_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One host key and one client key for every server of the tests."""
    folder = tmp_path_factory.mktemp("ssh_keys")
    make_key(folder / "host_ed25519")
    make_key(folder / "id_ed25519")
    return folder


@pytest.fixture
def start_sshd(tmp_path: Path, ssh_keys: Path) -> Iterator[StartSshd]:
    """Starts servers of a test's own: ``start_sshd(addresses=4, MaxSessions="1")``."""
    yield from _starter(tmp_path, ssh_keys)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory, ssh_keys: Path) -> Iterator[Sshd]:
    """One well-behaved server on sixteen addresses, for all tests of a module."""
    starter = _starter(tmp_path_factory.mktemp("sshd"), ssh_keys)
    yield next(starter)(addresses=_ADDRESSES_A_SERVER, prefix="127.60")
    for _ in starter:
        pass


def _answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0
