"""Many nodes at once: at most so many in flight, each outcome handed on as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator

from inventory.fleet import Node
from inventory.transport import Command, Ending, OnOutput, Outcome, Phase, Transport
from inventory.transport.descriptors import allowed_at_once
from inventory.transport.ending import outcome_of

_Outcomes = asyncio.Queue[Outcome | BaseException | None]
"""Outcomes, an exception to raise, and None from each worker that is done."""


async def fan_out(
    transport: Transport,
    work: Iterable[tuple[Node, Command]],
    concurrency: int = 64,
    on_output: OnOutput | None = None,
    stop: asyncio.Event | None = None,
) -> AsyncGenerator[Outcome, None]:
    """Outcomes in the order in which they come, one for every piece of work.

    Fewer than `concurrency` are in flight where this process may not open files enough.
    `work` is read as slots become free. Memory is bounded by `concurrency`, however slow the reader of the
    outcomes is. Setting `stop` interrupts: what runs is stopped and yields CANCELLED with its partial output,
    what has not begun yields CANCELLED too, so that no node is ever missing. Leaving the loop early, or an
    exception of the transport (a person's mistake or a bug), stops everything that runs.
    """
    pending = iter(work)
    at_once = allowed_at_once(max(concurrency, 1))
    # A full queue makes the workers wait, so outcomes with megabytes of output do not pile up.
    outcomes: _Outcomes = asyncio.Queue(maxsize=at_once)
    workers = [
        asyncio.create_task(_worker(transport, pending, on_output, stop, outcomes)) for _ in range(at_once)
    ]
    stopper = asyncio.create_task(_stop_all(stop, workers)) if stop is not None else None
    running = len(workers)
    try:
        while running:
            outcome = await outcomes.get()
            if outcome is None:
                running -= 1
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                yield outcome
    finally:
        for task in [*workers, *([stopper] if stopper else [])]:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _worker(
    transport: Transport,
    pending: Iterator[tuple[Node, Command]],
    on_output: OnOutput | None,
    stop: asyncio.Event | None,
    outcomes: _Outcomes,
) -> None:
    try:
        for node, command in pending:
            if stop is not None and stop.is_set():
                outcome = _not_begun(node)
            else:
                try:
                    outcome = await transport.run(node, command, on_output)
                except asyncio.CancelledError as cancelled:
                    read = outcome_of(cancelled)
                    if stop is None or not stop.is_set() or read is None:
                        raise
                    outcome = read
            await _put(outcomes, outcome, stop)
    except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
        await outcomes.put(error)
    await _put(outcomes, None, stop)


async def _put(
    outcomes: _Outcomes,
    outcome: Outcome | None,
    stop: asyncio.Event | None,
) -> None:
    """Hand on an outcome that exists, even if the interruption arrives at this very moment."""
    while True:
        try:
            await outcomes.put(outcome)
        except asyncio.CancelledError:
            if stop is None or not stop.is_set():
                raise
            continue
        return


async def _stop_all(stop: asyncio.Event, workers: list[asyncio.Task[None]]) -> None:
    await stop.wait()
    for worker in workers:
        worker.cancel("interrupted")


def _not_begun(node: Node) -> Outcome:
    return Outcome(
        node=node.name,
        ending=Ending.CANCELLED,
        phase=Phase.RESOLVE,
        attempts=0,
        message="interrupted before it began",
        ended_at=time.time(),
    )
