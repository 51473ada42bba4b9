"""A real PostgreSQL server for tests, in a folder of its own, reached by loopback and by a Unix socket.

Import the fixtures `postgres_server` and `postgres_url` where they are needed. Without PostgreSQL's server
programs (Debian: postgresql) tests that use them are skipped; with CI=true they fail instead.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


class PostgresServer:
    """One server; `kill` and `start` make it crash and come back."""

    user = "keeper"

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self.password = secrets.token_hex(8)
        self.port = _free_port()

    def make(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self._folder, _server_user())
        given = self._folder / "password"
        given.write_text(self.password)
        given.chmod(0o644)
        self._run(
            "initdb", "-D", str(self._data), "-U", self.user, "-E", "UTF8", "--locale=C", "--no-sync",
            "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={given}",
        )  # fmt: skip

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            "shared_buffers": "16MB",
            "max_connections": "40",
            # The machine does not crash in these tests, only the server does: the page cache survives.
            "fsync": "off",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_as_server_user(), str(self._programs / "postgres"), "-D", str(self._data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to every process of the server, as when its machine's memory runs out."""
        assert self._process is not None
        all_of_it = psutil.Process(self._process.pid)
        for process in [all_of_it, *all_of_it.children(recursive=True)]:
            process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)

    def new_database(self) -> str:
        """The URL of an empty database, by the socket and without a password."""
        name = "t" + secrets.token_hex(6)
        self._run("createdb", "-h", str(self._folder), "-p", str(self.port), "-U", self.user, name)
        return f"postgresql://{self.user}@/{name}?host={self._folder}&port={self.port}"

    def tcp_url(self, url: str, password: str | None = None) -> str:
        """The same database by loopback, with a password."""
        name = url.split("/")[3].split("?")[0]
        return f"postgresql://{self.user}:{password or self.password}@127.0.0.1:{self.port}/{name}"

    def _answers(self) -> bool:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", str(self._folder), "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_as_server_user(), str(self._programs / program), *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=self._folder,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    programs = find_programs()
    if programs is None:
        reason = "PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Short, because the path of a Unix socket may have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    server = PostgresServer(programs, folder)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of a new, empty database."""
    return postgres_server.new_database()


def find_programs() -> Path | None:
    """The folder with initdb and postgres: the newest of Debian's, or the one on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _server_user() -> str:
    """PostgreSQL refuses to run as root."""
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise RuntimeError("there is no user 'postgres' or 'nobody' to run PostgreSQL as")


def _as_server_user() -> list[str]:
    command = ["setpriv", "--pdeathsig=KILL"]
    if os.geteuid() != 0:
        return command
    entry = pwd.getpwnam(_server_user())
    return [*command, f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
