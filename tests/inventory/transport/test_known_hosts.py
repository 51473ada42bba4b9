"""Host keys: strict by default, learned when asked, never changed."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from inventory.transport import Command, Ending, Phase
from inventory.transport.fanout import fan_out
from inventory.transport.known_hosts import KnownHosts, Trust, fingerprint
from inventory.transport.ssh import SshTransport
from tests.sshd import Sshd, StartSshd, make_key, public

TRUE = Command(("true",))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("keys")
    return public(make_key(folder / "one")), public(make_key(folder / "two"))


async def test_an_unknown_host_key_is_refused_with_its_fingerprint(sshd: Sshd, tmp_path: Path) -> None:
    async with SshTransport(sshd.settings(known_hosts=(str(tmp_path / "absent"),))) as ssh:
        outcome = await ssh.run(sshd.node(), TRUE)
    assert (outcome.ending, outcome.phase) == (Ending.REJECTED, Phase.HOST_KEY)
    assert fingerprint(public(sshd.host_key)) in outcome.message
    assert "--accept-new" in outcome.message
    assert not (tmp_path / "absent").exists()


async def test_accept_new_learns_the_key_and_the_next_run_needs_no_leave(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "new" / "known_hosts"
    async with SshTransport(sshd.settings(known_hosts=(str(file),), accept_new=True)) as ssh:
        assert (await ssh.run(sshd.node(), TRUE)).ok
    assert file.read_text() == f"[{sshd.addresses[0]}]:{sshd.port} {public(sshd.host_key)}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    async with SshTransport(sshd.settings(known_hosts=(str(file),))) as ssh:
        assert (await ssh.run(sshd.node(), TRUE)).ok


async def test_accept_new_for_many_nodes_at_once_writes_each_once(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text("# a file whose last line is unfinished")
    async with SshTransport(sshd.settings(known_hosts=(str(file),), accept_new=True)) as ssh:
        for _ in range(2):
            work = [(node, TRUE) for node in sshd.nodes()]
            assert all([outcome.ok async for outcome in fan_out(ssh, work)])
    lines = file.read_text().splitlines()
    assert sorted(lines[1:]) == sorted(
        f"[{address}]:{sshd.port} {public(sshd.host_key)}" for address in sshd.addresses
    )


@pytest.mark.parametrize("accept_new", [False, True], ids=["strict", "accept_new"])
async def test_a_changed_host_key_is_always_refused_and_its_line_is_named(
    sshd: Sshd, tmp_path: Path, keys: tuple[str, str], accept_new: bool
) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"# comment\n\n[{sshd.addresses[0]}]:{sshd.port} {keys[0]}\n")
    before = file.read_bytes()
    async with SshTransport(sshd.settings(known_hosts=(str(file),), accept_new=accept_new)) as ssh:
        outcome = await ssh.run(sshd.node(), TRUE)
    assert (outcome.ending, outcome.phase, outcome.attempts) == (Ending.REJECTED, Phase.HOST_KEY, 1)
    assert "CHANGED" in outcome.message
    assert f"{file}:3" in outcome.message
    assert f"ssh-keygen -f {file} -R '[{sshd.addresses[0]}]:{sshd.port}'" in outcome.message
    assert file.read_bytes() == before


async def test_a_revoked_host_key_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(sshd.known_hosts.read_text() + f"@revoked * {public(sshd.host_key)}\n")
    async with SshTransport(sshd.settings(known_hosts=(str(file),))) as ssh:
        outcome = await ssh.run(sshd.node(), TRUE)
    assert (outcome.ending, outcome.phase) == (Ending.REJECTED, Phase.HOST_KEY)
    assert "revoked" in outcome.message


async def test_a_key_recorded_under_the_name_of_the_node_counts(sshd: Sshd, tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"{sshd.node().name} {public(sshd.host_key)}\n")
    async with SshTransport(sshd.settings(known_hosts=(str(file),))) as ssh:
        assert (await ssh.run(sshd.node(), TRUE)).ok


def test_two_processes_that_learn_the_same_host_write_one_line(tmp_path: Path, keys: tuple[str, str]) -> None:
    file = tmp_path / "known_hosts"
    barrier = threading.Barrier(8)
    verdicts = []

    def learn(key: str) -> None:
        # Each has read the file while it was still empty, as processes that started together have.
        known = KnownHosts([str(file)])
        barrier.wait()
        verdicts.append((key, known.learn(["node"], 22, key).trust))

    threads = [threading.Thread(target=learn, args=(keys[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (line,) = file.read_text().splitlines()
    learned = line.removeprefix("node ")
    assert all(trust is (Trust.KNOWN if key == learned else Trust.CHANGED) for key, trust in verdicts)


def test_hashed_names_patterns_negation_and_ports_are_read_as_openssh_reads_them(
    tmp_path: Path, keys: tuple[str, str]
) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"hidden {keys[0]}\n[hidden2]:2222 {keys[0]}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, capture_output=True)
    assert "hidden" not in file.read_text()
    file.write_text(file.read_text() + f"rack*,!rack9 {keys[1]}\n[10.0.0.*]:2222 {keys[1]}\n")
    known = KnownHosts([str(file)])

    def trust(name: str, port: int, key: str) -> Trust:
        return known.judge([name], port, key).trust

    assert trust("hidden", 22, keys[0]) is Trust.KNOWN
    assert trust("hidden", 2200, keys[0]) is Trust.KNOWN
    assert trust("hidden2", 2222, keys[0]) is Trust.KNOWN
    assert trust("hidden2", 22, keys[0]) is Trust.UNKNOWN
    assert trust("hidden", 22, keys[1]) is Trust.CHANGED
    assert trust("rack1", 22, keys[1]) is Trust.KNOWN
    assert trust("RACK1", 22, keys[1]) is Trust.KNOWN
    assert trust("rack9", 22, keys[1]) is Trust.UNKNOWN
    assert trust("10.0.0.7", 2222, keys[1]) is Trust.KNOWN
    assert trust("10.0.0.7", 22, keys[1]) is Trust.UNKNOWN


def test_the_fingerprint_is_the_one_that_ssh_keygen_shows(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    shown = subprocess.run(
        ["ssh-keygen", "-lf", f"{key}.pub"], check=True, capture_output=True, text=True
    ).stdout
    assert fingerprint(public(key)) in shown.split()


async def test_a_host_certificate_is_believed_for_its_authority(
    tmp_path: Path, start_sshd: StartSshd
) -> None:
    authority = make_key(tmp_path / "ca")
    server = start_sshd(HostCertificate=str(tmp_path / "host-cert.pub"))
    subprocess.run(
        [
            "ssh-keygen",
            "-q",
            "-s",
            str(authority),
            "-I",
            "host",
            "-h",
            "-n",
            server.addresses[0],
            f"{server.host_key}.pub",
        ],
        check=True,
        capture_output=True,
    )
    (server.folder / "host_ed25519-cert.pub").rename(tmp_path / "host-cert.pub")
    server.stop()
    server.start()
    file = tmp_path / "known_hosts"
    file.write_text(f"@cert-authority [127.*]:{server.port} {public(authority)}\n")
    async with SshTransport(server.settings(known_hosts=(str(file),))) as ssh:
        outcome = await ssh.run(server.node(), TRUE)
    assert outcome.ok, outcome.message
    other = make_key(tmp_path / "other_ca")
    file.write_text(f"@cert-authority [127.*]:{server.port} {public(other)}\n")
    async with SshTransport(server.settings(known_hosts=(str(file),))) as ssh:
        outcome = await ssh.run(server.node(), TRUE)
    assert (outcome.ending, outcome.phase) == (Ending.REJECTED, Phase.HOST_KEY)
