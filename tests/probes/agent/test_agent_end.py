"""However the agent ends, nothing of it stays on the node: no process, no file, no change."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

import pytest

from probes.agent.bundle import bundle, fresh_nonce
from probes.model import Status
from tests.probes.agent.agent_process import AgentProcess, ask, run

HANGING = [
    ask("command_ignores_term", lane="a", timeout=60.0),
    ask("leaves_a_daemon_and_hangs", lane="b", timeout=60.0),
    ask("hangs_with_signals_blocked", lane="c", timeout=60.0),
    ask("hangs_in_a_command", lane="d", timeout=60.0),
]


def waiting_bytes(pipe: IO[bytes]) -> int:
    answer = fcntl.ioctl(pipe.fileno(), termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(answer, sys.byteorder)


def sleeping_commands(agent: AgentProcess) -> int:
    """How many `sleep` commands of the agent's checks run now."""
    count = 0
    for pid in agent.left():
        try:
            count += Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"
        except OSError:
            continue
    return count


def hung(agent: AgentProcess) -> AgentProcess:
    """Wait until all of HANGING hang: 2 + 2 + 1 sleeps, and four workers below guard and agent."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if sleeping_commands(agent) == 5:
            return agent
        time.sleep(0.05)
    raise AssertionError(f"the checks did not get to hang: {agent.left()} {agent.errors()}")


def family(agent: AgentProcess) -> tuple[int, int]:
    """Process numbers of the guard and of the agent below it."""
    guard = agent.process.pid
    children = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    return guard, int(children[0])


def test_the_end_of_stdin_ends_everything_within_a_second() -> None:
    with hung(AgentProcess(HANGING)) as agent:
        assert agent.process.stdin
        agent.process.stdin.close()
        assert agent.gone_within(10.0), agent.left()
        assert agent.process.wait(1) == 1


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_everything_within_a_second(sig: signal.Signals) -> None:
    with hung(AgentProcess(HANGING)) as agent:
        agent.process.send_signal(sig)
        assert agent.gone_within(10.0), agent.left()
        assert agent.process.wait(1) == 128 + sig


def test_killing_the_guard_ends_everything_within_a_second() -> None:
    with hung(AgentProcess(HANGING)) as agent:
        os.kill(family(agent)[0], signal.SIGKILL)
        assert agent.gone_within(10.0), agent.left()


def test_killing_the_agent_below_the_guard_ends_everything_within_a_second() -> None:
    with hung(AgentProcess(HANGING)) as agent:
        os.kill(family(agent)[1], signal.SIGKILL)
        assert agent.gone_within(10.0), agent.left()
        assert agent.process.wait(1) == 128 + signal.SIGKILL
        assert "killed by signal 9" in agent.errors()


def test_killing_guard_and_agent_at_once_ends_workers_and_the_commands_they_started() -> None:
    checks = [
        ask("hangs_in_a_command", lane="a", timeout=60.0),
        ask("hangs_in_python", lane="b", timeout=60.0),
    ]
    with AgentProcess(checks) as agent:
        end = time.monotonic() + 10
        while sleeping_commands(agent) < 1 and time.monotonic() < end:
            time.sleep(0.05)
        for pid in family(agent):
            os.kill(pid, signal.SIGSTOP)
        for pid in family(agent):
            os.kill(pid, signal.SIGKILL)
        assert agent.gone_within(10.0), agent.left()


def test_the_budget_ends_everything_and_each_check_still_has_its_record() -> None:
    never = ask("fine", lane="a", name="a.never")
    load = ask("fine", lane="z", name="z.load", loads=True)
    with AgentProcess([*HANGING, never, load], budget=2.0) as agent:
        started = time.monotonic()
        records = agent.finish()
        assert time.monotonic() - started < 20
        assert agent.left() == []
    assert all(r.status is Status.TIMEOUT for r in records.values())
    assert all("the budget of 2 s is spent" in r.detail for r in records.values())
    assert records["a.never"].detail.startswith("not begun: ")
    assert records["z.load"].detail.startswith("not begun: ")


def test_a_reader_that_stops_reading_blocks_no_check_and_loses_nothing() -> None:
    # More than a pipe holds.
    checks = [ask("fine", f"odd.n{n}", params={"padding": n}) for n in range(20)]
    large = [ask("large_answer", f"big.n{n}", lane="big") for n in range(8)]
    with AgentProcess([*checks, *large], budget=20.0) as agent:
        assert agent.process.stdout
        end = time.monotonic() + 15
        # The pipe is full, and only guard and agent are left: they wait for their reader.
        while waiting_bytes(agent.process.stdout) < 60 << 10 or len(agent.left()) > 2:
            assert time.monotonic() < end, agent.left()
            time.sleep(0.05)
        records = agent.finish()
    assert {r.status for r in records.values()} == {Status.ANSWERED}


def test_a_reader_that_never_reads_does_not_outlive_the_budget() -> None:
    large = [ask("large_answer", f"big.n{n}", lane="big") for n in range(8)]
    with AgentProcess(large, budget=1.0) as agent:
        assert agent.process.wait(12) == 75
        assert "could not be written" in agent.errors()
        assert agent.left() == []


def test_a_closed_stdout_ends_everything() -> None:
    with hung(AgentProcess(HANGING)) as agent:
        assert agent.process.stdout
        agent.process.stdout.close()
        assert agent.gone_within(10.0), agent.left()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p[: len(p) // 2], "the payload was cut short: "),
        (lambda p: b"garbage!" + p[8:], "the payload cannot be used: error: Error -3"),
        (lambda p: p[:-9] + b"x" * 9, "the payload cannot be used: error: Error -"),
    ],
)
def test_a_damaged_payload_is_one_clear_line_and_a_status(damage, words: str) -> None:
    with AgentProcess([ask("fine")], payload=damage) as agent:
        assert agent.process.stdin
        agent.process.stdin.close()
        assert agent.process.wait(10) == 1
        errors = agent.errors()
        assert words in errors
        assert len(errors.splitlines()) == 1


def test_the_agent_writes_nothing_below_home_temporary_and_working_folders(tmp_path: Path) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("import part\nprint(part.VALUE)\n")
    (tmp_path / "part.py").write_text("VALUE = 7\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    newest = time.time_ns()
    checks = [
        ask("runs_python_tool", params={"tool": str(tool)}),
        ask("dies_by_a_signal"),
        ask("crashes_on_core"),
        ask("leaves_a_daemon"),
    ]
    records = run(*checks, env=env, cwd=str(tmp_path))
    assert records["odd.runs_python_tool"].measures[0].value == 7
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert not [p for p in Path("/").glob("core*") if p.stat().st_mtime_ns > newest]


def test_the_agent_leaves_the_flags_of_its_stdout_as_they_were() -> None:
    bundled = bundle([], budget=5.0)
    reader, writer = os.pipe()
    process = subprocess.Popen(
        bundled.argv(fresh_nonce(), sys.executable),
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stderr
    process.stdin.write(bundled.payload)
    process.stdin.flush()
    assert b"hello" in os.read(reader, 65536)
    assert os.get_blocking(writer)
    process.wait(10)
    assert os.get_blocking(writer)
    for stream in (process.stdin, process.stderr):
        stream.close()
    os.close(reader)
    os.close(writer)
