"""The ledger under kill -9, many writers, and a crashing server."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from inventory.ledger import Ledger, open_ledger
from tests.inventory.conftest import Writers
from tests.postgres import PostgresServer

KILLS = 200


def _acknowledged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _verify(ledger: Ledger, acknowledged: list[dict[str, Any]]) -> None:
    """Sound, whole, and with everything that any writer was told is there."""
    assert ledger.check() == []
    events = ledger.events()
    by_id = {event.id: event for event in events}
    batches: Counter[str] = Counter()
    for event in events:
        if event.kind == "batch":
            assert event.run is not None
            batches[event.run] += event.evidence["verdicts"]
    verdicts: Counter[str] = Counter()
    for run in ledger.runs():
        verdicts[run.id] = len(ledger.verdicts(run.id))
    # The event and the verdicts of a batch were one transaction: both are there or neither.
    assert +verdicts == batches
    promised: Counter[str] = Counter()
    for fact in acknowledged:
        assert "failed" not in fact, fact
        if "event" in fact:
            assert (by_id[fact["event"]].node, by_id[fact["event"]].target) == (fact["node"], fact["target"])
        elif "verdicts" in fact:
            promised[fact["run"]] += fact["verdicts"]
        else:
            ledger.run(fact["run"])
    assert all(verdicts[run] >= number for run, number in promised.items())
    found = ledger.measurements([f"host.x.m{i}" for i in range(10)], "h100", limit=10**6)
    assert {len(values) for values in found.values()} == {verdicts.total()}


def test_two_hundred_kills_in_the_middle_of_writing_lose_nothing_acknowledged(
    writers: Writers, tmp_path: Path
) -> None:
    dice = random.Random(20)
    writes = 0
    for round_ in range(KILLS):
        # A new file every tenth time, so that some are killed while they make it.
        url = str(tmp_path / f"ledger-{round_ // 10}.db")
        if round_ % 10 == 0:
            known: list[dict[str, Any]] = []
        pid, acks = writers.start("endless", url)
        if round_ % 10 == 0:
            time.sleep(dice.uniform(0, 0.15))
        else:
            _wait_for_lines(acks, dice.randrange(8))
            time.sleep(dice.uniform(0, 0.005))
        writers.kill(pid)
        known += _acknowledged(acks)
        writes += len(_acknowledged(acks))
        with open_ledger(url) as ledger:
            _verify(ledger, known)
    # Otherwise the kills came before there was anything to lose.
    assert writes > 2 * KILLS


@pytest.mark.postgres
def test_killed_clients_of_postgresql_lose_nothing_acknowledged(writers: Writers, postgres_url: str) -> None:
    dice = random.Random(21)
    known: list[dict[str, Any]] = []
    for _ in range(25):
        pid, acks = writers.start("endless", postgres_url)
        _wait_for_lines(acks, dice.randrange(8))
        time.sleep(dice.uniform(0, 0.005))
        writers.kill(pid)
        known += _acknowledged(acks)
        with open_ledger(postgres_url) as ledger:
            _verify(ledger, known)
    assert len(known) > 50


@pytest.mark.postgres
def test_a_killed_postgresql_server_loses_nothing_acknowledged(
    writers: Writers, postgres_server: PostgresServer, postgres_url: str
) -> None:
    known: list[dict[str, Any]] = []
    with open_ledger(postgres_url) as survivor:
        for _ in range(3):
            pid, acks = writers.start("endless", postgres_url)
            _wait_for_lines(acks, 20)
            postgres_server.kill()
            writers.wait(pid)
            told = _acknowledged(acks)
            # The writer is told in one line that its server went away.
            assert told[-1]["failed"].startswith("LedgerError: the ledger postgresql://"), told[-1]
            known += told[:-1]
            postgres_server.start()
            with open_ledger(postgres_url) as ledger:
                _verify(ledger, known)
            # A ledger that was open all along finds its server again.
            assert survivor.check() == []


@pytest.mark.parametrize("number", [2, 8])
def test_writers_at_once_all_succeed_and_nothing_is_lost(
    writers: Writers, ledger_url: str, tmp_path: Path, number: int
) -> None:
    go = tmp_path / "go"
    steps = 30
    # The ledger does not exist yet: they make it at once, too.
    started = [writers.start("steps", ledger_url, go=str(go), count=steps) for _ in range(number)]
    go.touch()
    for pid, _ in started:
        writers.wait(pid)
    told = [fact for _, acks in started for fact in _acknowledged(acks)]
    assert [fact for fact in told if "failed" in fact] == []
    assert len(told) == number * steps
    with open_ledger(ledger_url) as ledger:
        assert ledger.check() == []
        assert len(ledger.events(kind="transition")) == number * steps
        # Each read the count and wrote one more: a lost update would show as a number that is there twice.
        counts = [event.evidence["value"] for event in ledger.events(kind="counted")]
        assert counts == list(range(1, number * steps + 1))


def test_of_eight_writers_exactly_one_takes_each_node(
    writers: Writers, ledger_url: str, tmp_path: Path
) -> None:
    nodes = [f"node{i:02}" for i in range(25)]
    with open_ledger(ledger_url) as ledger, ledger.transaction() as tx:
        for node in nodes:
            tx.transition(node, "available", "test", "ready", {})
    go = tmp_path / "go"
    started = [writers.start("compare_and_set", ledger_url, go=str(go), nodes=nodes) for _ in range(8)]
    go.touch()
    for pid, _ in started:
        writers.wait(pid)
    told = [fact for _, acks in started for fact in _acknowledged(acks)]
    assert [fact for fact in told if "failed" in fact] == []
    assert Counter(fact["node"] for fact in told if fact.get("won")) == Counter(nodes)
    with open_ledger(ledger_url) as ledger:
        assert len(ledger.events(kind="transition")) == 2 * len(nodes)


def test_eight_processes_that_make_the_same_ledger_at_once_all_succeed(
    writers: Writers, tmp_path: Path
) -> None:
    for round_ in range(5):
        url = str(tmp_path / f"new-{round_}.db")
        go = tmp_path / f"go-{round_}"
        go.touch()
        started = [writers.start("steps", url, go=str(go), count=1) for _ in range(8)]
        for pid, _ in started:
            writers.wait(pid)
        assert [_acknowledged(acks)[0].get("failed") for _, acks in started] == [None] * 8
        with open_ledger(url) as ledger:
            assert ledger.check() == []
            assert len(ledger.states(None)) == 8


def _wait_for_lines(path: Path, number: int) -> None:
    deadline = time.monotonic() + 30
    while len(path.read_text().splitlines()) < number:
        assert time.monotonic() < deadline, f"the writer came to {path.read_text()!r} only"
        time.sleep(0.001)
