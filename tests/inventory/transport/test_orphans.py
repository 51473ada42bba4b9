"""Nothing of a command outlives it on the node, whoever dies first. Real sshd, real processes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inventory.fleet import Node
from inventory.transport import Command, Ending, Limits, Phase, Transport, transport_for
from inventory.transport.ending import outcome_of
from inventory.transport.watchdog import HEARTBEAT, LOGIN_LINE, opening
from tests.inventory.transport.processes import alive, unique_sleep, wait_for
from tests.sshd import Sshd, StartSshd

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["ssh", "local"])
def node(request: pytest.FixtureRequest, sshd: Sshd) -> Node:
    return sshd.node() if request.param == "ssh" else Node(name="here", local=True)


def transport(node: Node, sshd: Sshd) -> Transport:
    return transport_for([node], sshd.settings())


def family(marker: str) -> tuple[str, ...]:
    """A child, a grandchild, one that ignores TERM, and a daemon that has left session and process group."""
    script = (
        f"(trap '' TERM; sleep {marker}; :) & sh -c 'sleep {marker}; :' & "
        f"(setsid sh -c 'sleep {marker}; :' </dev/null >/dev/null 2>&1 &) ; echo started; wait"
    )
    return ("sh", "-c", script)


async def test_a_command_past_its_limit_is_killed_with_all_that_it_started(node: Node, sshd: Sshd) -> None:
    marker = unique_sleep()
    begun = time.monotonic()
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(family(marker), limits=Limits(command=1)))
    assert (outcome.ending, outcome.phase) == (Ending.TIMEOUT, Phase.COMMAND)
    assert outcome.stdout == b"started\n"
    assert time.monotonic() - begun < 8
    wait_for(marker, 0)


async def test_a_cancelled_run_leaves_nothing_and_tells_what_it_read(node: Node, sshd: Sshd) -> None:
    marker = unique_sleep()
    started = asyncio.Event()
    async with transport(node, sshd) as running:
        task = asyncio.ensure_future(
            running.run(node, Command(family(marker)), on_output=lambda name, data: started.set())
        )
        await asyncio.wait_for(started.wait(), 15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
    outcome = outcome_of(cancelled.value)
    assert outcome is not None
    assert (outcome.ending, outcome.stdout) == (Ending.CANCELLED, b"started\n")
    wait_for(marker, 0)


async def test_a_flooding_command_is_killed_when_its_output_passes_the_cap(node: Node, sshd: Sshd) -> None:
    marker = unique_sleep()
    script = f"sleep {marker} & cat /dev/zero; wait"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(stdout_bytes=1 << 20)))
    assert (outcome.ending, outcome.phase, outcome.truncated) == (Ending.FAILED, Phase.OUTPUT, True)
    assert len(outcome.stdout) == 1 << 20
    wait_for(marker, 0)


async def test_what_a_command_leaves_in_its_group_ends_after_the_output_limit(node: Node, sshd: Sshd) -> None:
    marker = unique_sleep()
    script = f"sleep {marker} & exit 3"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(output=1)))
    assert (outcome.ending, outcome.phase, outcome.status) == (Ending.EXIT, Phase.OUTPUT, 3)
    assert "held its output open for 1 s" in outcome.message
    wait_for(marker, 0)


async def test_late_output_of_a_background_child_is_waited_for(node: Node, sshd: Sshd) -> None:
    script = "(sleep 0.5; echo late) & exit 0"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(output=10)))
    assert (outcome.ok, outcome.stdout) == (True, b"late\n")


async def test_a_daemon_of_its_own_session_survives_a_command_that_ended_by_itself(
    node: Node, sshd: Sshd
) -> None:
    marker = unique_sleep()
    script = f"setsid sleep {marker} </dev/null >/dev/null 2>&1 & exit 0"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(output=1)))
    assert outcome.ok
    # The watchdog is gone by the time that its grace would have been over.
    await asyncio.sleep(2)
    survivors = wait_for(marker, 1)
    os.kill(survivors[0], signal.SIGKILL)


async def test_a_daemon_that_holds_the_output_is_cut_off_with_the_status_known(
    node: Node, sshd: Sshd
) -> None:
    marker = unique_sleep()
    script = f"setsid sleep {marker} & echo done; exit 0"
    begun = time.monotonic()
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command(("sh", "-c", script), limits=Limits(output=1)))
    assert time.monotonic() - begun < 6
    assert (outcome.ok, outcome.phase, outcome.stdout) == (True, Phase.OUTPUT, b"done\n")
    os.kill(wait_for(marker, 1)[0], signal.SIGKILL)


async def test_a_command_with_its_stdin_as_input_is_killed_too(node: Node, sshd: Sshd) -> None:
    marker = unique_sleep()
    command = Command(("sh", "-s"), stdin=f"sleep {marker}\n".encode(), limits=Limits(command=1))
    async with transport(node, sshd) as running:
        outcome = await running.run(node, command)
    assert outcome.ending is Ending.TIMEOUT
    wait_for(marker, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_survives_the_end_of_the_controller(node: Node, sshd: Sshd, number: signal.Signals) -> None:
    marker = unique_sleep()
    controller = start_controller(sshd, node, family(marker))
    try:
        wait_for(marker, count=7)
        controller.send_signal(number)
        controller.wait(timeout=15)
        wait_for(marker, 0)
    finally:
        controller.kill()


def test_nothing_survives_a_controller_that_is_frozen_longer_than_the_lease(sshd: Sshd) -> None:
    """As behind a cable that was cut: the connection stands, and nobody speaks any more."""
    marker = unique_sleep()
    controller = start_controller(sshd, sshd.node(), family(marker), limit=3)
    try:
        wait_for(marker, count=7)
        controller.send_signal(signal.SIGSTOP)
        wait_for(marker, 0, seconds=30)
    finally:
        controller.kill()


def test_a_command_lives_on_as_long_as_its_lease_is_renewed() -> None:
    marker = unique_sleep()
    process = subprocess.Popen(["sh", "-c", LOGIN_LINE], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(opening(Command(family(marker)), "ab" * 8, lease=2))
    process.stdin.flush()
    wait_for(marker, count=7)
    for _ in range(10):
        time.sleep(0.5)
        process.stdin.write(HEARTBEAT)
        process.stdin.flush()
    assert len(alive(marker)) == 7
    wait_for(marker, 0)
    process.wait(10)
    process.stdin.close()


def test_a_login_that_swallows_the_script_never_ends_as_a_success() -> None:
    process = subprocess.Popen(["sh", "-c", LOGIN_LINE], stdin=subprocess.PIPE)
    # What is left when start-up files read the script: the renewals of the lease.
    process.communicate(HEARTBEAT * 3, timeout=10)
    assert process.returncode == 125


async def test_a_node_that_goes_silent_under_a_command_is_lost(start_sshd: StartSshd) -> None:
    server = start_sshd()
    started = asyncio.Event()
    command = Command(("sh", "-c", "echo started; sleep 60"), limits=Limits(command=math.inf))
    async with transport_for([server.node()], server.settings(keepalive=0.3)) as running:
        task = asyncio.ensure_future(
            running.run(server.node(), command, on_output=lambda name, data: started.set())
        )
        await asyncio.wait_for(started.wait(), 15)
        frozen = server.children()
        for process in frozen:
            process.suspend()
        try:
            outcome = await asyncio.wait_for(task, 15)
        finally:
            for process in frozen:
                process.resume()
    assert (outcome.ending, outcome.phase, outcome.stdout) == (Ending.LOST, Phase.COMMAND, b"started\n")
    assert "keepalive" in outcome.message


async def test_nothing_survives_the_death_of_sshd(start_sshd: StartSshd) -> None:
    server = start_sshd()
    marker = unique_sleep()
    started = asyncio.Event()
    async with transport_for([server.node()], server.settings()) as running:
        task = asyncio.ensure_future(
            running.run(server.node(), Command(family(marker)), on_output=lambda name, data: started.set())
        )
        await asyncio.wait_for(started.wait(), 15)
        wait_for(marker, count=7)
        server.kill()
        outcome = await asyncio.wait_for(task, 15)
    assert (outcome.ending, outcome.phase, outcome.status) == (Ending.LOST, Phase.COMMAND, None)
    assert outcome.stdout == b"started\n"
    wait_for(marker, 0)


async def test_a_watching_command_has_its_stdin_open_until_it_exits(node: Node, sshd: Sshd) -> None:
    script = "import sys; sys.stdin.buffer.read(5); print('read', flush=True); sys.stdin.read(); print('end')"
    command = Command(
        (sys.executable, "-c", script), stdin=b"12345", self_watching=True, limits=Limits(command=1.5)
    )
    async with transport(node, sshd) as running:
        outcome = await running.run(node, command)
    # It was still waiting for the end of its stdin when the limit passed.
    assert (outcome.ending, outcome.stdout) == (Ending.TIMEOUT, b"read\n")


async def test_the_watchdog_itself_leaves_no_process(node: Node, sshd: Sshd) -> None:
    before = set(alive("ltpctl-watchdog"))
    async with transport(node, sshd) as running:
        for _ in range(5):
            assert (await running.run(node, Command(("true",)))).ok
    deadline = time.monotonic() + 5
    while set(alive("ltpctl-watchdog")) - before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_command_finds_no_child_that_it_did_not_start(node: Node, sshd: Sshd) -> None:
    script = "import os\ntry:\n    os.wait()\nexcept ChildProcessError:\n    print('none')"
    async with transport(node, sshd) as running:
        outcome = await running.run(node, Command((sys.executable, "-c", script)))
    assert outcome.stdout == b"none\n"


def start_controller(
    sshd: Sshd, node: Node, argv: tuple[str, ...], limit: float = 600
) -> subprocess.Popen[bytes]:
    request = {
        "host": sshd.addresses[0],
        "port": sshd.port,
        "known_hosts": str(sshd.known_hosts),
        "identity": str(sshd.identity),
        "argv": argv,
        "limit": limit,
        "local": node.local,
    }
    # By stdin and not as an argument: the controller must not be taken for what it started.
    controller = subprocess.Popen(
        [sys.executable, "-m", "tests.inventory.transport.controller"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert controller.stdin is not None
    controller.stdin.write(json.dumps(request).encode())
    controller.stdin.close()
    return controller
