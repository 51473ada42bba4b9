"""Old SSH servers and BMC shells: refused by the transport for nodes, served by the console."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from inventory.errors import UsageError
from inventory.fleet import Bmc, Node
from inventory.transport import Command, Ending, Limits, Phase
from inventory.transport.console import Console, ConsolePlace, password_of
from inventory.transport.phases import PhaseError
from inventory.transport.ssh import SshTransport
from tests.sshd import Sshd, StartSshd, free_port, make_key, public

ADDRESS = "127.82.0.1"
PASSWORD = "calvin:secret"
PROMPT = r"/admin1-> $"


@dataclass(frozen=True)
class OldBmc:
    place: ConsolePlace
    port: int


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[OldBmc]:
    """A prompt behind keyboard-interactive login, 1024-bit SHA-1 key exchange, SHA-1 RSA and CBC alone."""
    key_file = make_key(tmp_path / "host_rsa", "rsa")
    port = free_port(ADDRESS)
    (tmp_path / "known_hosts").write_text(f"[{ADDRESS}]:{port} {public(key_file)}\n")
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> None:
        await asyncssh.create_server(
            _Bmc,
            ADDRESS,
            port,
            server_host_keys=[str(key_file)],
            kex_algs=["diffie-hellman-group1-sha1"],
            encryption_algs=["aes128-cbc", "3des-cbc"],
            mac_algs=["hmac-sha1"],
            signature_algs=["ssh-rsa"],
            process_factory=_shell,
            line_editor=False,
            encoding="utf-8",
        )
        ready.set()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    place = ConsolePlace(
        ADDRESS,
        "ADMIN",
        port,
        old=True,
        known_hosts=(str(tmp_path / "known_hosts"),),
        limits=Limits(command=10),
    )
    yield OldBmc(place, port)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


class _Bmc(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return False

    def kbdint_auth_supported(self) -> bool:
        return True

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
        return "BMC", "Out of band", "", [("Password: ", False)]

    def validate_kbdint_response(self, username: str, responses: Any) -> bool:
        return username == "ADMIN" and list(responses) == [PASSWORD]


async def _shell(process: asyncssh.SSHServerProcess[str]) -> None:
    """Echoes what is typed, as a terminal does, and knows two commands."""
    process.stdout.write("\r\nFirmware 1.0 (2011)\r\n/admin1-> ")
    line = ""
    while True:
        typed = await process.stdin.read(1)
        if not typed:
            break
        process.stdout.write("\r\n" if typed == "\r" else typed)
        if typed != "\r":
            line += typed
            continue
        if line == "power status":
            process.stdout.write("Chassis Power is on\r\nlast event: none\r\n")
        elif line == "exit":
            break
        elif line == "hang":
            await asyncio.Event().wait()
        else:
            process.stdout.write(f"unknown: {line}\r\n")
        line = ""
        process.stdout.write("/admin1-> ")
    process.exit(0)


def type_password(prompt: str) -> str:
    assert prompt == "Password: "
    return PASSWORD


def test_a_prompt_is_followed_and_the_echo_left_out(bmc: OldBmc) -> None:
    with Console(bmc.place, type_password) as console:
        assert console.run("power status", PROMPT) == "Chassis Power is on\nlast event: none"
        assert console.run("what", PROMPT) == "unknown: what"


def test_sending_and_waiting_by_hand(bmc: OldBmc) -> None:
    with Console(bmc.place, type_password) as console:
        assert "Firmware 1.0" in console.read_until(PROMPT)
        console.send("power status\r")
        assert console.read_until(r"Power is (on|off)").endswith("Power is on")


async def test_the_transport_for_nodes_refuses_it_and_points_to_the_console(bmc: OldBmc, sshd: Sshd) -> None:
    settings = sshd.settings(known_hosts=bmc.place.known_hosts)
    async with SshTransport(settings) as ssh:
        outcome = await ssh.run(Node(name="bmc", address=ADDRESS, port=bmc.port), Command(("true",)))
    assert (outcome.ending, outcome.phase) == (Ending.FAILED, Phase.KEY_EXCHANGE)
    assert "console" in outcome.message


def test_old_algorithms_are_used_only_where_the_console_says_so(bmc: OldBmc) -> None:
    strict = ConsolePlace(ADDRESS, "ADMIN", bmc.port, known_hosts=bmc.place.known_hosts)
    with pytest.raises(PhaseError) as refused, Console(strict, type_password):
        pass
    assert (refused.value.ending, refused.value.phase) == (Ending.FAILED, Phase.KEY_EXCHANGE)
    assert "allow old algorithms" in refused.value.message


def test_a_wrong_password_is_rejected_and_not_shown(bmc: OldBmc) -> None:
    with pytest.raises(PhaseError) as refused, Console(bmc.place, lambda prompt: "not the password"):
        pass
    assert (refused.value.ending, refused.value.phase) == (Ending.REJECTED, Phase.AUTH)
    assert "not the password" not in refused.value.message


def test_a_changed_host_key_is_refused_by_the_console_too(bmc: OldBmc, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other_rsa", "rsa")
    file = tmp_path / "changed"
    file.write_text(f"# old\n[{ADDRESS}]:{bmc.port} {public(other)}\n")
    place = ConsolePlace(ADDRESS, "ADMIN", bmc.port, old=True, known_hosts=(str(file),), accept_new=True)
    with pytest.raises(PhaseError) as refused, Console(place, type_password):
        pass
    assert (refused.value.ending, refused.value.phase) == (Ending.REJECTED, Phase.HOST_KEY)
    assert f"{file}:2" in refused.value.message


def test_a_console_that_does_not_answer_is_bounded(bmc: OldBmc) -> None:
    with Console(bmc.place, type_password) as console:
        console.read_until(PROMPT)
        console.send("hang\r")
        with pytest.raises(PhaseError) as late:
            console.read_until(PROMPT, seconds=0.5)
    assert (late.value.ending, late.value.phase) == (Ending.TIMEOUT, Phase.COMMAND)
    assert "'hang'" in late.value.message


def test_a_console_that_hangs_up_is_lost(bmc: OldBmc) -> None:
    with Console(bmc.place, type_password) as console:
        console.read_until(PROMPT)
        console.send("exit\r")
        with pytest.raises(PhaseError) as lost:
            console.read_until(PROMPT)
    assert lost.value.ending is Ending.LOST


def test_a_real_sshd_with_nothing_but_old_algorithms_is_understood_up_to_the_login(
    start_sshd: StartSshd, tmp_path: Path
) -> None:
    """OpenSSH speaks what old servers speak; it offers no login by password, and that is what is said."""
    rsa = make_key(tmp_path / "host_rsa", "rsa")
    server = start_sshd(
        HostKey=str(rsa),
        KexAlgorithms="diffie-hellman-group14-sha1",
        HostKeyAlgorithms="ssh-rsa",
        Ciphers="3des-cbc",
        MACs="hmac-sha1",
    )
    file = tmp_path / "old_known_hosts"
    file.write_text(f"[{server.addresses[0]}]:{server.port} {public(rsa)}\n")
    place = ConsolePlace(server.addresses[0], "nobody", server.port, old=True, known_hosts=(str(file),))
    with pytest.raises(PhaseError) as refused, Console(place, type_password):
        pass
    assert (refused.value.ending, refused.value.phase) == (Ending.REJECTED, Phase.AUTH)
    assert "publickey" in refused.value.message


def test_a_password_comes_from_the_environment_or_a_file_and_its_absence_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BMC_PASSWORD", "from the environment")
    (tmp_path / "password").write_text("from the file\n")
    by_environment = Bmc("ssh", "10.9.1.9", password_env="BMC_PASSWORD")
    by_file = Bmc("ssh", "10.9.1.9", password_file=str(tmp_path / "password"))
    assert password_of(by_environment)("Password: ") == "from the environment"
    assert password_of(by_file)("Password: ") == "from the file"
    monkeypatch.delenv("BMC_PASSWORD")
    with pytest.raises(UsageError, match="BMC_PASSWORD is not set"):
        password_of(by_environment)("Password: ")
    with pytest.raises(UsageError, match="no password"):
        password_of(Bmc("ssh", "10.9.1.9"))("Password: ")
