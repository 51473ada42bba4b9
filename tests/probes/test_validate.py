"""The whole way: real agents run real checks on nodes that are this machine, some with something wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import socket
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from inventory.errors import UsageError
from inventory.fleet import Node
from inventory.transport import Command, Limits, OnOutput, Transport, transport_for
from inventory.transport import Outcome as Ended
from inventory.transport.local import LocalTransport
from inventory.transport.settings import SshSettings
from probes.catalogue import Catalogue, load_catalogue
from probes.model import CheckRecord, NodeVerdict, Outcome, Verdict
from probes.plan import make_plan
from probes.profiles import Profiles, RuleBook
from probes.validate import Observer, Options, ValidationResult, validate

CHECKS = """\
schema: ltpctl/checks/1
family: site
checks:
  site.answer:
    what: Reads a number.
    why: Test.
    fix: Write a smaller one.
    level: quick
    file: {number}
    parse: {{kind: number}}
    metrics:
      answer:
        what: the number
        unit: things
        limit: {{fail: "< 100", warn: "< 50"}}
        peers: {{rule: majority}}
  site.slow:
    what: Takes its time.
    why: Test.
    fix: Wait.
    level: standard
    timeout: 30
    command: [sleep, "30"]
    parse: {{kind: exit_status}}
    metrics:
      status: {{what: exit status, limit: {{fail: "== 0"}}}}
  site.hung:
    what: Never ends.
    why: Test.
    fix: Stop waiting.
    level: standard
    timeout: 0.5
    command: [sleep, "1000"]
    parse: {{kind: exit_status}}
    metrics:
      status: {{what: exit status, limit: {{fail: "== 0"}}}}
  site.work:
    what: Loads.
    why: Test.
    fix: Rest.
    level: standard
    loads: true
    command: ["true"]
    parse: {{kind: exit_status}}
    metrics:
      status: {{what: exit status, limit: {{fail: "== 0"}}}}
"""


class Seen(Observer):
    def __init__(self) -> None:
        self.news: list[tuple[str, str]] = []

    def node_started(self, node: str) -> None:
        self.news.append(("started", node))

    def record(self, node: str, record: CheckRecord) -> None:
        self.news.append((record.check, node))

    def node_done(self, verdict: NodeVerdict) -> None:
        self.news.append(("done", verdict.node))


@pytest.fixture
def checks(tmp_path: Path) -> Catalogue:
    number = tmp_path / "number"
    number.write_text("42\n")
    path = tmp_path / "site.yaml"
    path.write_text(CHECKS.format(number=number))
    return load_catalogue([path])


@pytest.fixture
def book(checks: Catalogue) -> RuleBook:
    return RuleBook(checks, Profiles({}))


def local(name: str = "n1", **more: object) -> Node:
    return Node(name, local=True, **more)  # type: ignore[arg-type]


def program(folder: Path, name: str, text: str) -> str:
    """An interpreter that is none."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def run(book: RuleBook, nodes: list[Node], *only: str, **more: object) -> ValidationResult:
    plan = make_plan(book.catalogue, "comprehensive", only, load_in_use=bool(more.pop("load_in_use", False)))
    async with LocalTransport() as transport:
        return await validate(nodes, plan, transport, book, **more)  # type: ignore[arg-type]


async def test_a_check_that_meets_its_limit_makes_the_node_healthy(book: RuleBook) -> None:
    seen = Seen()
    result = await run(book, [local("a"), local("b")], "site.answer", observer=seen)
    assert [(v.node, v.verdict) for v in result.verdicts] == [("a", Verdict.HEALTHY), ("b", Verdict.HEALTHY)]
    assert result.summary == {
        Verdict.HEALTHY: 2,
        Verdict.DEGRADED: 0,
        Verdict.UNHEALTHY: 0,
        Verdict.UNKNOWN: 0,
    }
    assert [what for what, node in seen.news if node == "a"] == [
        "started",
        "site.answer",
        "accelerator.count",
        "done",
    ]
    assert not result.interrupted


@pytest.mark.parametrize(
    ("number", "verdict", "limit"), [(70, Verdict.DEGRADED, "< 50"), (170, Verdict.UNHEALTHY, "< 100")]
)
async def test_a_value_past_its_limit_is_a_finding_with_its_proof(
    book: RuleBook, tmp_path: Path, number: int, verdict: Verdict, limit: str
) -> None:
    (tmp_path / "number").write_text(str(number))
    (judged,) = (await run(book, [local()], "site.answer")).verdicts
    assert judged.verdict is verdict
    finding = next(f for f in judged.findings if f.check == "site.answer")
    assert (finding.value, finding.unit, finding.limit, finding.source) == (
        number,
        "things",
        limit,
        "default",
    )


async def test_the_cycle_collector_is_left_as_it_was_found(book: RuleBook) -> None:
    before = gc.get_threshold()
    during: list[tuple[int, ...]] = []

    class Seen(Observer):
        def node_started(self, node: str) -> None:
            during.append(gc.get_threshold())

    await run(book, [local()], "site.answer", observer=Seen())
    assert during
    assert during[0][0] > before[0]
    assert gc.get_threshold() == before


async def test_a_limit_of_the_inventory_holds_for_that_node_alone(book: RuleBook) -> None:
    strict = local("strict", vars={"limits": {"site.answer.answer": "== 41"}})
    result = await run(book, [local("usual"), strict], "site.answer")
    assert [v.verdict for v in result.verdicts] == [Verdict.HEALTHY, Verdict.UNHEALTHY]
    assert result.verdicts[1].findings[0].source == "inventory"


async def test_a_check_that_hangs_is_a_timeout_and_the_others_still_answer(book: RuleBook) -> None:
    (judged,) = (await run(book, [local()], "site.hung", "site.answer")).verdicts
    assert judged.verdict is Verdict.UNKNOWN
    assert judged.checks["site.hung"] is Outcome.TIMEOUT
    assert judged.checks["site.answer"] is Outcome.PASS


async def test_a_mistake_of_a_person_is_told_before_any_node_is_touched(book: RuleBook) -> None:
    seen = Seen()
    with pytest.raises(UsageError, match="no profile describes the SKU 'h1'"):
        await run(book, [local("a"), local("b", sku="h1")], "site.answer", observer=seen)
    assert seen.news == []


@pytest.mark.parametrize(
    ("text", "check", "says"),
    [
        (None, "agent.start", "there is no .*nowhere/python3"),
        (
            "echo 'ltp agent: needs Python 3.8 or newer, this is 3.6.8' >&2; exit 1",
            "agent.start",
            "this is 3.6.8",
        ),
        ("echo 'This account is currently not available.'; exit 1", "agent.start", "currently not available"),
        ("kill -9 $$", "transport.command", "KILL|signal"),
        ("cat /dev/zero", "transport.output", "more than is read"),
        ("exit 0", "agent.start", "exit status 0"),
    ],
)
async def test_an_agent_that_does_not_start_is_a_clear_finding_of_that_node_alone(
    book: RuleBook, tmp_path: Path, text: str | None, check: str, says: str
) -> None:
    python = str(tmp_path / "nowhere/python3") if text is None else program(tmp_path, "python3", text)
    bad, good = (await run(book, [local("bad", python=python), local("good")], "site.answer")).verdicts
    assert (bad.verdict, good.verdict) == (Verdict.UNKNOWN, Verdict.HEALTHY)
    (finding,) = [f for f in bad.findings if f.check != "fleet.sku"]
    assert finding.check == check
    assert finding.outcome is Outcome.UNKNOWN
    assert re.search(says, finding.message), finding.message
    assert bad.checks["site.answer"] is Outcome.UNKNOWN


async def test_an_agent_that_dies_midway_keeps_what_it_said(book: RuleBook, tmp_path: Path) -> None:
    # The interpreter is real; something kills the agent while its second check runs.
    text = 'exec 3<&0; python3 "$@" <&3 & sleep 1.5; kill -9 $!; wait; exit 3'
    python = program(tmp_path, "python3", text)
    (judged,) = (await run(book, [local(python=python)], "site.answer", "site.slow")).verdicts
    assert judged.checks["site.answer"] is Outcome.PASS
    assert judged.checks["site.slow"] is Outcome.UNKNOWN
    assert judged.verdict is Verdict.UNKNOWN
    assert [f.check for f in judged.findings] == ["agent.run"]
    assert judged.findings[0].value == 1


async def test_an_agent_that_leaves_a_process_behind_says_so_and_that_is_a_finding(
    book: RuleBook, tmp_path: Path
) -> None:
    # Only a process that is stuck in the kernel survives SIGKILL, and none can be made here: what the agent
    # would then say is written into its last words.
    change = 's/"clean": *true/"clean": false/'
    text = f"exec 3<&0; python3 \"$@\" <&3 | sed -u '{change}'"
    python = program(tmp_path, "python3", text)
    (judged,) = (await run(book, [local(python=python)], "site.answer")).verdicts
    assert judged.checks["site.answer"] is Outcome.PASS
    assert [(f.check, f.outcome) for f in judged.findings] == [("agent.leftover", Outcome.WARN)]
    assert judged.verdict is Verdict.DEGRADED


async def test_a_node_that_refuses_is_unknown_and_delays_nobody(book: RuleBook) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nodes = [Node("refuses", address="127.0.0.1", port=bound.getsockname()[1]), local("good")]
        plan = make_plan(book.catalogue, "quick", ["site.answer"])
        async with transport_for(nodes, SshSettings()) as transport:
            result = await validate(nodes, plan, transport, book)
    refuses, good = result.verdicts
    assert (refuses.verdict, good.verdict) == (Verdict.UNKNOWN, Verdict.HEALTHY)
    assert refuses.findings[0].check == "transport.connect"
    assert "1 of 1 checks without an answer" in refuses.findings[0].reference


async def test_stopping_returns_what_is_known_and_the_rest_is_unknown(book: RuleBook) -> None:
    stop = asyncio.Event()

    class StopsEarly(Observer):
        def record(self, node: str, record: CheckRecord) -> None:
            if record.check == "site.answer":
                stop.set()

    nodes = [local("first"), local("second"), local("third")]
    start = time.monotonic()
    result = await run(
        book,
        nodes,
        "site.answer",
        "site.slow",
        observer=StopsEarly(),
        options=Options(concurrency=1),
        stop=stop,
    )
    assert time.monotonic() - start < 20
    assert result.interrupted
    assert [v.node for v in result.verdicts] == ["first", "second", "third"]
    assert {v.verdict for v in result.verdicts} == {Verdict.UNKNOWN}
    first, *others = result.verdicts
    assert first.checks["site.answer"] is Outcome.PASS
    assert all(v.checks["site.answer"] is Outcome.UNKNOWN for v in others)
    assert {v.findings[0].check for v in result.verdicts} == {"transport.interrupted"}


async def test_cancelling_the_task_returns_what_is_known_too(book: RuleBook) -> None:
    tasks: list[asyncio.Task[ValidationResult]] = []

    class Cancels(Observer):
        def record(self, node: str, record: CheckRecord) -> None:
            if record.check == "site.answer":
                tasks[0].cancel()

    coroutine = run(book, [local("a")], "site.answer", "site.slow", observer=Cancels())
    tasks.append(asyncio.create_task(coroutine))
    result = await tasks[0]
    assert result.interrupted
    assert result.verdicts[0].checks["site.answer"] is Outcome.PASS
    assert result.verdicts[0].checks["site.slow"] is Outcome.UNKNOWN


async def test_a_node_in_use_is_not_loaded_unless_told(book: RuleBook) -> None:
    nodes, use = [local("busy"), local("free")], {"busy": "allocated to job 7"}
    busy, free = (await run(book, nodes, "site.answer", "site.work", in_use_by=use)).verdicts
    assert (busy.checks["site.work"], free.checks["site.work"]) == (Outcome.NOT_APPLICABLE, Outcome.PASS)
    assert (busy.verdict, free.verdict) == (Verdict.HEALTHY, Verdict.HEALTHY)
    assert "not run: the node is in use: allocated to job 7" in {f.message for f in busy.findings}
    told = await run(book, nodes, "site.answer", "site.work", in_use_by=use, load_in_use=True)
    assert told.verdicts[0].checks["site.work"] is Outcome.PASS


async def test_a_node_is_asked_nothing_when_every_check_is_withheld(book: RuleBook) -> None:
    (judged,) = (await run(book, [local()], "site.work", in_use_by={"n1": "draining"})).verdicts
    assert judged.checks == {"site.work": Outcome.NOT_APPLICABLE}
    assert judged.verdict is Verdict.UNKNOWN


async def test_peers_are_compared_over_the_whole_run(book: RuleBook, tmp_path: Path) -> None:
    nodes = [local(f"n{i}") for i in range(4)]

    class Changes(Observer):
        def node_done(self, verdict: NodeVerdict) -> None:
            (tmp_path / "number").write_text("43" if verdict.node == "n1" else "42")

    result = await run(book, nodes, "site.answer", observer=Changes(), options=Options(concurrency=1))
    odd = [v for v in result.verdicts if v.verdict is not Verdict.HEALTHY]
    assert [(v.node, v.verdict) for v in odd] == [("n2", Verdict.DEGRADED)]
    assert odd[0].findings[0].source == "peers"


class Shifted:
    """The local transport seen from a controller whose clock is off."""

    def __init__(self, seconds: float) -> None:
        self.inner, self.seconds = LocalTransport(clock=lambda: time.time() + seconds), seconds

    async def __aenter__(self) -> Shifted:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Ended:
        return await self.inner.run(node, command, on_output)


@pytest.mark.parametrize(("seconds", "outcome"), [(0, None), (-4, Outcome.WARN), (100, Outcome.FAIL)])
async def test_a_clock_that_differs_from_the_controllers_is_a_finding(
    book: RuleBook, seconds: float, outcome: Outcome | None
) -> None:
    transport: Transport = Shifted(seconds)
    plan = make_plan(book.catalogue, "quick", ["site.answer"])
    result = await validate([local()], plan, transport, book, clock=lambda: time.time() + seconds)
    found = [f for f in result.verdicts[0].findings if f.check == "host.clock"]
    assert [f.outcome for f in found] == ([outcome] if outcome else [])
    if found:
        assert isinstance(found[0].value, float)
        assert found[0].value == pytest.approx(-seconds, abs=1.5)


async def test_the_quick_plan_that_ships_judges_this_machine_and_leaves_no_process() -> None:
    checks = load_catalogue()
    book = RuleBook(checks, Profiles({}))
    plan = make_plan(checks, "quick")
    async with LocalTransport() as transport:
        result = await validate([local("here")], plan, transport, book)
    (judged,) = result.verdicts
    assert set(plan.names) <= set(judged.checks)
    assert Outcome.PASS in judged.checks.values()
    assert not [f for f in judged.findings if f.check.startswith(("transport.", "agent."))]
    agents = [
        pid
        for pid in os.listdir("/proc")
        if pid.isdigit() and b"ltp agent: needs" in _command_line(pid) and _parent(pid) == os.getpid()
    ]
    assert agents == []


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


async def test_connecting_limits_are_the_callers(book: RuleBook) -> None:
    given: list[Limits] = []

    class Looks(Shifted):
        async def run(self, node: Node, command: Command, on_output: OnOutput | None = None) -> Ended:
            given.append(command.limits)
            return await super().run(node, command, on_output)

    plan = make_plan(book.catalogue, "quick", ["site.answer"])
    mine = replace(Limits(), connect=3.5)
    await validate([local()], plan, Looks(0), book, options=Options(limits=mine, quiet_budget=7))
    assert given[0].connect == 3.5
    assert given[0].command > 7
