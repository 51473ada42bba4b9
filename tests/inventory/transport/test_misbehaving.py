"""Each way in which a server can misbehave is an outcome of its own, within its own limit."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncssh
import pytest

from inventory.fleet import Node
from inventory.transport import Command, Ending, Limits, Outcome, Phase, Retry
from inventory.transport.fanout import fan_out
from inventory.transport.settings import SshSettings
from inventory.transport.ssh import SshTransport
from tests.misbehaving import LOGIN_BANNER, NOISE, Fault, Misbehaving, misbehaving
from tests.sshd import Sshd, free_port, public

LIMITS = Limits(
    resolve=1, connect=1, banner=1, handshake=1, auth=1, exec=1, command=1, output=1, stdout_bytes=1 << 20
)
COMMAND = Command(("true",), limits=LIMITS)
SLACK = 3.0
"""Seconds that a loaded machine may add to a limit of one second."""


@pytest.fixture
async def servers(sshd: Sshd) -> AsyncIterator[Misbehaving]:
    key = asyncssh.read_private_key(sshd.host_key)
    async with misbehaving(free_port("127.80.0.1"), key) as running:
        yield running


def settings(sshd: Sshd, servers: Misbehaving, **changes: object) -> SshSettings:
    file = sshd.folder / f"known_hosts.{servers.port}"
    file.write_text(f"[127.80.0.*]:{servers.port} {public(sshd.host_key)}\n" + sshd.known_hosts.read_text())
    return sshd.settings(known_hosts=(str(file),), **changes)


def node(servers: Misbehaving, fault: Fault) -> Node:
    return Node(name=fault.name.lower(), address=servers.address(fault), port=servers.port)


EXPECTED = {
    Fault.NEVER_SENDS_A_BANNER: (Ending.TIMEOUT, Phase.BANNER, "sent no SSH banner within 1 s"),
    Fault.TRICKLES_ITS_BANNER: (Ending.TIMEOUT, Phase.BANNER, "sent no SSH banner within 1 s"),
    Fault.CLOSES_AT_ONCE: (Ending.LOST, Phase.BANNER, "before its SSH banner"),
    Fault.SPEAKS_AN_ANCIENT_PROTOCOL: (Ending.FAILED, Phase.BANNER, "does not speak SSH"),
    Fault.HANGS_IN_KEY_EXCHANGE: (
        Ending.TIMEOUT,
        Phase.KEY_EXCHANGE,
        "did not finish the key exchange within 1 s",
    ),
    Fault.DROPS_IN_KEY_EXCHANGE: (Ending.LOST, Phase.KEY_EXCHANGE, "during the key exchange"),
    Fault.HANGS_IN_AUTHENTICATION: (
        Ending.TIMEOUT,
        Phase.AUTH,
        "did not decide on the authentication within 1 s",
    ),
    Fault.REFUSES_EVERYBODY: (Ending.REJECTED, Phase.AUTH, "refused to let"),
    Fault.HANGS_AFTER_AUTHENTICATION: (Ending.TIMEOUT, Phase.EXEC, "did not start the command within 1 s"),
    Fault.REFUSES_THE_SESSION: (Ending.REJECTED, Phase.EXEC, "refuses to run a command"),
    Fault.REFUSES_THE_COMMAND: (Ending.REJECTED, Phase.EXEC, "refuses to run a command"),
    Fault.DROPS_IN_THE_MIDDLE: (Ending.LOST, Phase.COMMAND, "the connection was lost"),
    Fault.ENDS_WITHOUT_A_STATUS: (Ending.LOST, Phase.COMMAND, "without telling how the command ended"),
    Fault.EXITS_BY_SIGNAL: (Ending.SIGNAL, Phase.COMMAND, "signal SEGV"),
    Fault.FLOODS: (Ending.FAILED, Phase.OUTPUT, "more than 1048576 bytes to stdout"),
    Fault.SENDS_NOISE: (Ending.EXIT, Phase.COMMAND, ""),
    Fault.GOES_SILENT: (Ending.TIMEOUT, Phase.COMMAND, "did not end within 1 s"),
}


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
async def test_each_misbehaviour_is_an_outcome_of_its_own_within_its_limit(
    sshd: Sshd, servers: Misbehaving, fault: Fault
) -> None:
    begun = time.monotonic()
    async with SshTransport(settings(sshd, servers)) as ssh:
        outcome = await ssh.run(node(servers, fault), COMMAND)
    ending, phase, message = EXPECTED[fault]
    assert (outcome.ending, outcome.phase) == (ending, phase), outcome
    assert message in outcome.message
    assert "\n" not in outcome.message
    assert time.monotonic() - begun < 1 + SLACK
    assert not outcome.ok or fault is Fault.SENDS_NOISE
    assert (outcome.status is not None) == (ending is Ending.EXIT)
    assert outcome.reached == (phase in (Phase.COMMAND, Phase.OUTPUT))


async def test_what_was_written_before_the_end_is_kept(sshd: Sshd, servers: Misbehaving) -> None:
    async with SshTransport(settings(sshd, servers)) as ssh:
        dropped = await ssh.run(node(servers, Fault.DROPS_IN_THE_MIDDLE), COMMAND)
        unended = await ssh.run(node(servers, Fault.ENDS_WITHOUT_A_STATUS), COMMAND)
        signalled = await ssh.run(node(servers, Fault.EXITS_BY_SIGNAL), COMMAND)
        flooded = await ssh.run(node(servers, Fault.FLOODS), COMMAND)
    assert dropped.stdout == b"the first half"
    assert unended.stdout == b"all of it"
    assert signalled.stdout == b"before the end"
    assert flooded.truncated
    assert flooded.stdout == b"x" * LIMITS.stdout_bytes


async def test_binary_noise_and_a_login_banner_arrive_unchanged_and_apart(
    sshd: Sshd, servers: Misbehaving
) -> None:
    async with SshTransport(settings(sshd, servers)) as ssh:
        outcome = await ssh.run(node(servers, Fault.SENDS_NOISE), COMMAND)
    assert outcome.stdout == NOISE
    assert outcome.stderr == NOISE
    assert LOGIN_BANNER.encode() not in outcome.stdout


async def test_none_of_them_delays_the_healthy_nodes(sshd: Sshd, servers: Misbehaving) -> None:
    """Every fault at once among healthy nodes: the healthy ones are done before the first limit passes."""
    work = [(node(servers, fault), COMMAND) for fault in Fault]
    work += [(healthy, replace(COMMAND, limits=Limits())) for healthy in sshd.nodes()]
    begun = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    async with SshTransport(settings(sshd, servers)) as ssh:
        async for outcome in fan_out(ssh, work, concurrency=len(work)):
            outcomes[outcome.node] = outcome
    assert time.monotonic() - begun < 1 + SLACK
    assert len(outcomes) == len(work)
    assert all(outcomes[healthy.name].ok for healthy in sshd.nodes())
    for fault, (ending, phase, _) in EXPECTED.items():
        assert (outcomes[fault.name.lower()].ending, outcomes[fault.name.lower()].phase) == (ending, phase)


async def test_a_refused_port_is_an_outcome_of_that_node_alone(sshd: Sshd) -> None:
    closed = Node(name="closed", address="127.60.0.1", port=free_port("127.60.0.1"))
    async with SshTransport(sshd.settings()) as ssh:
        outcomes = {o.node: o async for o in fan_out(ssh, [(closed, COMMAND), (sshd.node(), COMMAND)])}
    assert outcomes["closed"].ending is Ending.REFUSED
    assert outcomes["closed"].phase is Phase.CONNECT
    assert "is sshd running there" in outcomes["closed"].message
    assert outcomes[sshd.node().name].ok


async def test_a_server_that_never_completes_the_tcp_connection_is_bounded_by_the_connect_limit(
    sshd: Sshd,
) -> None:
    with socket.socket() as full:
        # A listener whose backlog is full leaves further connections unanswered.
        full.bind(("127.81.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.81.0.1", port))
        begun = time.monotonic()
        async with SshTransport(sshd.settings()) as ssh:
            outcome = await ssh.run(Node(name="full", address="127.81.0.1", port=port), COMMAND)
        for filler in fillers:
            filler.close()
    assert (outcome.ending, outcome.phase) == (Ending.TIMEOUT, Phase.CONNECT)
    assert time.monotonic() - begun < 1 + SLACK


async def test_a_name_that_does_not_exist_is_named(sshd: Sshd) -> None:
    # No name server is asked: a label of more than 63 characters cannot be looked up at all.
    async with SshTransport(sshd.settings()) as ssh:
        outcome = await ssh.run(Node(name="n" * 70), COMMAND)
    assert (outcome.ending, outcome.phase) == (Ending.FAILED, Phase.RESOLVE)
    assert "n" * 70 in outcome.message


async def test_a_name_server_that_does_not_answer_is_bounded_by_the_resolve_limit(sshd: Sshd) -> None:
    async def unanswered(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
        await asyncio.Event().wait()
        return []

    begun = time.monotonic()
    async with SshTransport(sshd.settings(resolver=unanswered)) as ssh:
        outcome = await ssh.run(Node(name="somewhere"), COMMAND)
    assert (outcome.ending, outcome.phase) == (Ending.TIMEOUT, Phase.RESOLVE)
    assert time.monotonic() - begun < 1 + SLACK


async def test_connecting_is_tried_again_but_a_rejection_is_not(sshd: Sshd, servers: Misbehaving) -> None:
    retry = Retry(attempts=3, pause=0.01)
    async with SshTransport(settings(sshd, servers, retry=retry)) as ssh:
        attempts = {
            fault: (await ssh.run(node(servers, fault), COMMAND)).attempts
            for fault in (
                Fault.CLOSES_AT_ONCE,
                Fault.DROPS_IN_KEY_EXCHANGE,
                Fault.REFUSES_EVERYBODY,
                Fault.REFUSES_THE_SESSION,
                Fault.DROPS_IN_THE_MIDDLE,
            )
        }
    assert attempts == {
        Fault.CLOSES_AT_ONCE: 3,
        Fault.DROPS_IN_KEY_EXCHANGE: 3,
        Fault.REFUSES_EVERYBODY: 1,
        Fault.REFUSES_THE_SESSION: 1,
        Fault.DROPS_IN_THE_MIDDLE: 1,
    }


async def test_the_time_of_each_phase_is_told(sshd: Sshd, servers: Misbehaving) -> None:
    async with SshTransport(settings(sshd, servers)) as ssh:
        healthy = await ssh.run(sshd.node(), COMMAND)
        silent = await ssh.run(node(servers, Fault.NEVER_SENDS_A_BANNER), COMMAND)
    phases = {
        Phase.RESOLVE,
        Phase.CONNECT,
        Phase.BANNER,
        Phase.KEY_EXCHANGE,
        Phase.AUTH,
        Phase.EXEC,
        Phase.COMMAND,
    }
    assert set(healthy.phase_seconds) == phases
    assert sum(healthy.phase_seconds.values()) == pytest.approx(healthy.seconds, abs=0.1)
    assert silent.phase_seconds[Phase.BANNER] >= 1
    assert Phase.KEY_EXCHANGE not in silent.phase_seconds
