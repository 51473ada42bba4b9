"""Commands on real sshd: words, input, output, endings, configuration, jump hosts, numbers."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from inventory.transport import Command, Ending, Limits, Outcome, Phase, Transport, transport_for
from inventory.transport.fanout import fan_out
from inventory.transport.ssh import SshTransport
from inventory.transport.watchdog import LOGIN_LINE, opening
from tests.sshd import Sshd, StartSshd, free_port, make_key

ROOT = Path(__file__).resolve().parents[3]
AWKWARD = (
    "a b",
    "it's",
    "back\\slash\\n",
    "!bang",
    "$HOME",
    "`x`",
    "two\nlines\n",
    "",
    "\udcff",
    "*",
    "~",
    '"q"',
    "é",
)


@pytest.fixture(params=["ssh", "local"])
def node(request: pytest.FixtureRequest, sshd: Sshd) -> Node:
    return sshd.node() if request.param == "ssh" else Node(name="here", local=True)


def transport(node: Node, sshd: Sshd) -> Transport:
    return transport_for([node], sshd.settings())


async def test_every_argument_arrives_as_it_is(node: Node, sshd: Sshd) -> None:
    show = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(os.fsencode(a) for a in sys.argv[1:]))"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command((sys.executable, "-c", show, *AWKWARD)))
    assert outcome.ok, outcome
    assert outcome.stdout.split(b"\0") == [os.fsencode(word) for word in AWKWARD]


@pytest.mark.parametrize(
    "shell",
    [name for name in ("sh", "bash", "dash", "zsh", "ksh", "tcsh", "csh", "fish") if shutil.which(name)],
)
def test_every_login_shell_hands_the_arguments_on_unchanged(shell: str) -> None:
    """What the SSH server does with the login shell of a user, here with every shell that is installed."""
    process = subprocess.Popen(
        [shell, "-c", LOGIN_LINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(opening(Command(("printf", "%s|", *AWKWARD)), "0" * 16))
    process.stdin.flush()
    assert process.stdout.read() == b"".join(os.fsencode(word) + b"|" for word in AWKWARD)
    assert process.wait(10) == 0
    process.stdin.close()


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
async def test_input_arrives_whole_and_ends(node: Node, sshd: Sshd, size: int) -> None:
    data = os.urandom(size)
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("cat",), stdin=data))
    assert (outcome.ok, outcome.stdout == data) == (True, True)


async def test_input_that_nobody_reads_does_no_harm(node: Node, sshd: Sshd) -> None:
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("true",), stdin=b"x" * 3_000_000))
    assert outcome.ok


async def test_a_script_that_was_cut_off_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    line = opening(Command(("touch", str(marker))), "0" * 16)
    for cut in (len(line) - 1, len(line) // 2):
        subprocess.run(["sh", "-c", LOGIN_LINE], input=line[:cut], check=False, capture_output=True)
    assert not marker.exists()


async def test_exit_status_and_both_streams_are_told_apart(node: Node, sshd: Sshd) -> None:
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", "echo out; echo err >&2; exit 7")))
    assert (outcome.ending, outcome.phase, outcome.status) == (Ending.EXIT, Phase.COMMAND, 7)
    assert (outcome.stdout, outcome.stderr, outcome.ok) == (b"out\n", b"err\n", False)


async def test_a_program_that_does_not_exist_is_status_127(node: Node, sshd: Sshd) -> None:
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("no-such-program-here",)))
    assert (outcome.ending, outcome.status) == (Ending.EXIT, 127)
    assert b"no-such-program-here" in outcome.stderr


@pytest.mark.parametrize("name", ["KILL", "SEGV", "TERM"])
async def test_an_end_by_signal_is_told_by_its_name(node: Node, sshd: Sshd, name: str) -> None:
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", f"echo before; kill -{name} $$")))
    assert (outcome.ending, outcome.signal, outcome.status) == (Ending.SIGNAL, name, None)
    assert outcome.stdout == b"before\n"
    assert not outcome.ok


async def test_a_nul_in_an_argument_is_the_callers_mistake(node: Node, sshd: Sshd) -> None:
    async with transport(node, sshd) as running:
        with pytest.raises(UsageError, match="NUL"):
            await running.run(node, Command(("echo", "a\0b")))


async def test_output_past_the_cap_of_stderr_is_dropped_and_the_answer_kept(node: Node, sshd: Sshd) -> None:
    script = "head -c 500000 /dev/zero >&2; echo answer"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(stderr_bytes=1000)))
    assert (outcome.ok, outcome.stdout, len(outcome.stderr), outcome.truncated) == (
        True,
        b"answer\n",
        1000,
        True,
    )


async def test_a_command_without_a_limit_streams_and_keeps_only_the_head(node: Node, sshd: Sshd) -> None:
    pieces: list[bytes] = []
    script = "i=0; while [ $i -lt 5 ]; do echo line $i; i=$((i+1)); done; head -c 100000 /dev/zero"
    limits = Limits(command=math.inf, stdout_bytes=20)
    async with transport(node, sshd) as running:
        outcome = await running.run(
            node, Command(("sh", "-c", script), limits=limits), lambda name, data: pieces.append(data)
        )
    assert b"".join(pieces) == b"".join(b"line %d\n" % number for number in range(5)) + bytes(100000)
    assert (outcome.ok, outcome.truncated, outcome.stdout) == (True, True, b"line 0\nline 1\nline 2"[:20])


async def test_the_times_of_start_and_end_are_those_of_the_controllers_clock(sshd: Sshd) -> None:
    """A node whose clock is years off changes nothing: limits and times come from here."""
    now = iter(range(1000, 2000))
    async with SshTransport(sshd.settings(clock=lambda: float(next(now)))) as ssh:
        outcome = await ssh.run(sshd.node(), Command(("date", "-d", "1999-01-01")))
    assert 1000 <= outcome.started_at < outcome.ended_at < 2000
    assert outcome.ok


async def test_a_login_that_is_refused_says_who_and_where(sshd: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    async with SshTransport(sshd.settings()) as ssh:
        outcome = await ssh.run(sshd.node(identity=str(stranger), user="somebody"), Command(("true",)))
    assert (outcome.ending, outcome.phase, outcome.attempts) == (Ending.REJECTED, Phase.AUTH, 1)
    assert "somebody" in outcome.message
    assert sshd.addresses[0] in outcome.message


async def test_an_identity_that_does_not_exist_is_the_persons_mistake(sshd: Sshd) -> None:
    async with SshTransport(sshd.settings()) as ssh:
        with pytest.raises(UsageError, match="/no/such/key does not exist"):
            await ssh.run(sshd.node(identity="/no/such/key"), Command(("true",)))


async def test_a_server_that_allows_no_session_is_told_apart_from_one_that_is_down(
    start_sshd: StartSshd,
) -> None:
    server = start_sshd(MaxSessions="0")
    async with SshTransport(server.settings()) as ssh:
        outcome = await ssh.run(server.node(), Command(("true",)))
    assert (outcome.ending, outcome.phase) == (Ending.REJECTED, Phase.EXEC)
    assert "MaxSessions" in outcome.message


async def test_ssh_config_decides_what_the_node_leaves_open(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host short\n  HostName {sshd.addresses[1]}\n  Port {sshd.port}\n  IdentityFile {sshd.identity}\n"
        f"  IdentityFile {tmp_path}/absent\n  UserKnownHostsFile {sshd.known_hosts}\n"
        f"  RemoteCommand echo not this\n  RequestTTY force\n  SetEnv A=B\n"
        f"Host other\n  HostName {sshd.addresses[1]}\n  Port 1\n  HostKeyAlias {sshd.addresses[2]}\n"
    )
    settings = sshd.settings(config_files=(str(config),), identities=(), known_hosts=())
    command = Command(("sh", "-c", "echo $SSH_CONNECTION; tty"))
    async with SshTransport(settings) as ssh:
        short = await ssh.run(Node(name="short"), command)
    assert short.stdout.split()[2:4] == [sshd.addresses[1].encode(), str(sshd.port).encode()]
    assert b"not a tty" in short.stdout
    async with SshTransport(sshd.settings(config_files=(str(config),))) as ssh:
        overridden = await ssh.run(Node(name="other", port=sshd.port), command)
    # HostKeyAlias is looked up with the port, as the file has it.
    assert overridden.stdout.split()[2:4] == [sshd.addresses[1].encode(), str(sshd.port).encode()]


async def test_a_broken_ssh_config_is_the_persons_mistake_with_its_line(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  Port twentytwo\n")
    async with SshTransport(sshd.settings(config_files=(str(config),))) as ssh:
        with pytest.raises(UsageError, match=r"config line 2: .*twentytwo"):
            await ssh.run(Node(name="any"), Command(("true",)))


async def test_a_proxy_command_carries_the_connection(sshd: Sshd, tmp_path: Path) -> None:
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import socket, sys, os, threading\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def back():\n"
        "    while data := s.recv(65536): os.write(1, data)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=back, daemon=True).start()\n"
        "while data := os.read(0, 65536): s.sendall(data)\n"
    )
    config = tmp_path / "config"
    config.write_text(f"Host {sshd.addresses[0]}\n  ProxyCommand {sys.executable} {relay} %h %p\n")
    async with SshTransport(sshd.settings(config_files=(str(config),))) as ssh:
        outcome = await ssh.run(sshd.node(), Command(("echo", "through")))
    assert outcome.stdout == b"through\n", outcome


async def test_the_agent_and_a_certificate_let_in(sshd: Sshd, start_sshd: StartSshd, tmp_path: Path) -> None:
    authority, person = make_key(tmp_path / "user_ca"), make_key(tmp_path / "person")
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["ssh-keygen", "-q", "-s", authority, "-I", "p", "-n", user, f"{person}.pub"], check=True)
    server = start_sshd(TrustedUserCAKeys=f"{authority}.pub")
    async with SshTransport(server.settings(identities=(str(person),))) as ssh:
        assert (await ssh.run(server.node(), Command(("true",)))).ok
    socket_path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket_path)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket_path.exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        environment = {**os.environ, "SSH_AUTH_SOCK": str(socket_path)}
        subprocess.run(["ssh-add", "-q", str(sshd.identity)], env=environment, check=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSH_AUTH_SOCK", str(socket_path))
            stranger = make_key(tmp_path / "stranger")
            async with SshTransport(sshd.settings(identities=(str(stranger),), agent=True)) as ssh:
                assert (await ssh.run(sshd.node(), Command(("true",)))).ok
            async with SshTransport(sshd.settings(identities=(str(stranger),), agent=False)) as ssh:
                assert (await ssh.run(sshd.node(), Command(("true",)))).ending is Ending.REJECTED
    finally:
        agent.terminate()
        agent.wait()


async def test_64_targets_go_through_one_jump_host_with_stock_limits(
    sshd: Sshd, start_sshd: StartSshd
) -> None:
    gate = start_sshd(MaxStartups="10:30:100", MaxSessions="10")
    racks = [sshd, *(start_sshd(addresses=16, prefix=f"127.{90 + index}") for index in range(3))]
    nodes = [rack.node(index, jump="gate") for rack in racks for index in range(16)]
    known = tuple(str(server.known_hosts) for server in [gate, *racks])
    fleet = {"gate": Node(name="gate", address=gate.addresses[0], port=gate.port)}
    work = [
        (node, Command(("sh", "-c", "echo $SSH_CONNECTION"), limits=Limits(command=110))) for node in nodes
    ]
    async with transport_for(nodes, sshd.settings(known_hosts=known), fleet) as running:
        outcomes = [outcome async for outcome in fan_out(running, work, concurrency=64)]
    assert len(outcomes) == 64
    assert [outcome.message for outcome in outcomes if not outcome.ok] == []
    assert gate.log.read_text().count("Accepted publickey") == 1


async def test_jump_hosts_form_chains_by_name_or_by_place(sshd: Sshd, start_sshd: StartSshd) -> None:
    outer, inner = start_sshd(), start_sshd()
    known = tuple(str(server.known_hosts) for server in (sshd, outer, inner))
    fleet = {"inner": Node(name="inner", address=inner.addresses[0], port=inner.port, jump="outer")}
    fleet["outer"] = Node(name="outer", address=outer.addresses[0], port=outer.port)
    by_place = f"{outer.addresses[0]}:{outer.port},{inner.addresses[0]}:{inner.port}"
    async with transport_for([], sshd.settings(known_hosts=known), fleet) as running:
        assert (await running.run(sshd.node(jump="inner"), Command(("true",)))).ok
        assert (await running.run(sshd.node(jump=by_place), Command(("true",)))).ok
    assert "Accepted publickey" in outer.log.read_text()
    assert "Accepted publickey" in inner.log.read_text()


async def test_jump_hosts_in_a_circle_are_named_and_not_followed(sshd: Sshd) -> None:
    fleet = {
        "a": Node(name="a", address="127.9.9.1", jump="b"),
        "b": Node(name="b", address="127.9.9.2", jump="a"),
    }
    async with transport_for([], sshd.settings(), fleet) as running:
        outcome = await asyncio.wait_for(running.run(sshd.node(jump="a"), Command(("true",))), 10)
    assert outcome.ending is Ending.FAILED
    assert "a -> b -> a" in outcome.message


async def test_a_dead_jump_host_is_named_for_each_node_and_waited_for_once(sshd: Sshd) -> None:
    with socket.socket() as mute:
        mute.bind(("127.83.0.1", 0))
        mute.listen(100)
        jump = f"127.83.0.1:{mute.getsockname()[1]}"
        limits = Limits(banner=1)
        work = [(sshd.node(index, jump=jump), Command(("true",), limits=limits)) for index in range(16)]
        begun = time.monotonic()
        async with SshTransport(sshd.settings()) as ssh:
            outcomes = [outcome async for outcome in fan_out(ssh, work, concurrency=4)]
    assert time.monotonic() - begun < 4
    assert len(outcomes) == 16
    assert {(outcome.ending, outcome.phase) for outcome in outcomes} == {(Ending.TIMEOUT, Phase.BANNER)}
    assert all(f"jump host {jump}" in outcome.message for outcome in outcomes)


async def test_a_jump_host_that_came_back_is_connected_again(sshd: Sshd, start_sshd: StartSshd) -> None:
    gate = start_sshd()
    settings = sshd.settings(known_hosts=(str(sshd.known_hosts), str(gate.known_hosts)))
    jump = f"{gate.addresses[0]}:{gate.port}"
    async with SshTransport(settings) as ssh:
        assert (await ssh.run(sshd.node(jump=jump), Command(("true",)))).ok
        running = asyncio.ensure_future(ssh.run(sshd.node(jump=jump), Command(("sleep", "30"))))
        await asyncio.sleep(0.5)
        gate.kill()
        assert (await asyncio.wait_for(running, 10)).ending is Ending.LOST
        gate.start()
        assert (await ssh.run(sshd.node(jump=jump), Command(("true",)))).ok


async def test_a_node_that_its_jump_host_cannot_reach_is_that_nodes_outcome(sshd: Sshd) -> None:
    jump = f"{sshd.addresses[0]}:{sshd.port}"
    closed = Node(name="closed", address="127.60.0.2", port=free_port("127.60.0.2"), jump=jump)
    async with SshTransport(sshd.settings()) as ssh:
        outcome = await ssh.run(closed, Command(("true",)))
        assert (await ssh.run(sshd.node(3, jump=jump), Command(("true",)))).ok
    assert (outcome.ending, outcome.phase) == (Ending.REFUSED, Phase.CONNECT)


def test_a_gibibyte_of_output_costs_neither_memory_nor_time(sshd: Sshd) -> None:
    answer = controlled(sshd, ("head", "-c", str(1 << 30), "/dev/zero"))
    assert answer["truncated"]
    assert answer["kept"] == Limits().stdout_bytes
    assert answer["peak_kib"] < 100 * 1024
    assert answer["seconds"] < 10


def test_streaming_a_quarter_of_a_gibibyte_stays_in_bounded_memory(sshd: Sshd) -> None:
    answer = controlled(sshd, ("head", "-c", str(1 << 28), "/dev/zero"), stream=True)
    assert (answer["ending"], answer["streamed"], answer["kept"]) == ("exit", 1 << 28, Limits().stdout_bytes)
    assert answer["peak_kib"] < 100 * 1024


async def test_256_nodes_answer(sshd: Sshd, start_sshd: StartSshd) -> None:
    racks = [sshd, *(start_sshd(addresses=16, prefix=f"127.{100 + index}") for index in range(15))]
    settings = sshd.settings(known_hosts=tuple(str(rack.known_hosts) for rack in racks))
    work = [(node, Command(("echo", node.name))) for rack in racks for node in rack.nodes()]
    async with SshTransport(settings) as ssh:
        outcomes: list[Outcome] = [outcome async for outcome in fan_out(ssh, work, concurrency=64)]
    assert len({outcome.node for outcome in outcomes}) == 256
    assert all(outcome.stdout == outcome.node.encode() + b"\n" for outcome in outcomes)


async def test_an_interruption_yields_an_outcome_for_every_node(sshd: Sshd) -> None:
    work = [(node, Command(("sh", "-c", "echo begun; sleep 60"))) for node in sshd.nodes()]
    begun = asyncio.Event()
    stop = asyncio.Event()
    counted = 0

    def count(name: str, data: bytes) -> None:
        nonlocal counted
        counted += 1
        if counted == 4:
            begun.set()

    async def interrupt() -> None:
        await begun.wait()
        stop.set()

    interrupter = asyncio.ensure_future(interrupt())
    async with SshTransport(sshd.settings()) as ssh:
        outcomes = [outcome async for outcome in fan_out(ssh, work, 4, count, stop)]
    await interrupter
    assert {outcome.node for outcome in outcomes} == {node.name for node in sshd.nodes()}
    assert {outcome.ending for outcome in outcomes} == {Ending.CANCELLED}
    assert sum(outcome.stdout == b"begun\n" for outcome in outcomes) == 4
    assert sum(outcome.attempts == 0 for outcome in outcomes) == 12


async def test_leaving_the_loop_early_stops_what_runs(sshd: Sshd) -> None:
    work = [(sshd.node(0), Command(("true",))), (sshd.node(1), Command(("sleep", "60")))]
    begun = time.monotonic()
    async with SshTransport(sshd.settings()) as ssh:
        outcomes = fan_out(ssh, work)
        first = await anext(outcomes)
        await outcomes.aclose()
    assert first.ok
    assert time.monotonic() - begun < 10


async def test_work_is_taken_only_as_slots_become_free(sshd: Sshd) -> None:
    taken = 0

    def work() -> object:
        nonlocal taken
        for node in sshd.nodes():
            taken += 1
            yield node, Command(("true",))

    async with SshTransport(sshd.settings()) as ssh:
        outcomes = fan_out(ssh, work(), concurrency=2)  # type: ignore[arg-type]
        await anext(outcomes)
        assert taken <= 8
        await outcomes.aclose()


def controlled(sshd: Sshd, argv: tuple[str, ...], stream: bool = False) -> dict[str, Any]:
    """Run a command by a controller of its own, whose memory can be measured."""
    request = {
        "host": sshd.addresses[0],
        "port": sshd.port,
        "known_hosts": str(sshd.known_hosts),
        "identity": str(sshd.identity),
        "argv": argv,
        "limit": 100,
        "stream": stream,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.inventory.transport.controller"],
        cwd=ROOT,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
