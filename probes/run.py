"""One validation under way: what is asked of each node, what has come back, and what is kept of it.

Two passes. The quiet checks run on every node; the loading ones then only where nobody works, as far as
the ledger and the quiet checks tell. A node's records are judged when its pass ends and then dropped:
only what peers and baselines compare is kept, so that thousands of nodes fit in memory.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from inventory.fleet import Node
from inventory.transport import Command, Transport
from inventory.transport import Outcome as Ended
from inventory.transport.fanout import fan_out
from probes.agent.bundle import Bundle, bundle, check_request, fresh_nonce
from probes.agent.frames import Decoder
from probes.baseline import Baseline
from probes.catalogue import Check
from probes.counters import WATCH_CHECK, watch_request
from probes.endings import INTERRUPTED, Failure, clock_offset, failure_of
from probes.fleetwide import (
    BaselineKey,
    Member,
    Note,
    compare_baselines,
    compare_kinds,
    compare_peers,
    compared_metrics,
)
from probes.judging import judge_clock, judge_ending, judge_kind, judge_report
from probes.metered import MeteredTransport
from probes.model import CheckRecord, Finding, NodeReport, NodeVerdict, Outcome, Status, Value
from probes.plan import IDLE_TAG, Plan, in_use, occupancy_checks, withheld
from probes.profiles import COUNT_CHECK, Kind, RuleBook, pci_ids
from probes.verdict import fold

if TYPE_CHECKING:
    from probes.validate import Observer, Options

OUTPUT_BYTES = 8 << 20
"""Most that the agent on one node may print; a node that floods is cut off there."""

KEPT_BYTES = 4096
"""Of stdout, for the words of a login that fails; the records are read as they come."""

SECONDS_AFTER_BUDGET = 15.0
"""The agent ends by itself when its budget is spent; this much later the transport ends it."""

COLLECT_AFTER = 10_000
"""New objects between two runs of Python's cycle collector while nodes answer. Each answer is thousands of
small values without cycles: by the default (700) a sixth of the CPU time goes into looking through them."""


@dataclass
class _Probed:
    """One node while it is probed, and what is kept of it afterwards."""

    node: Node
    kind: Kind
    left_out: dict[str, str]
    """Checks that this node is not asked -> why."""
    records: dict[str, CheckRecord] = field(default_factory=dict)
    """Of the pass that runs."""
    seconds: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, list[tuple[str | None, Value]]] = field(default_factory=dict)
    identified: bool = False
    """It told which accelerators it has."""
    met: bool = False
    """Its agent has spoken before."""
    ended: bool = False
    """Everything that will be asked of it has been judged."""


@dataclass
class _Answer:
    """What one run of the agent on one node says, while it comes."""

    decoder: Decoder
    bytes: int = 0


class ValidationRun:
    """`probe`, then `conclude`. After an interruption too: what was not probed is then unknown."""

    def __init__(
        self,
        nodes: Sequence[Node],
        plan: Plan,
        transport: Transport,
        rules: RuleBook,
        *,
        observer: Observer,
        options: Options,
        clock: Callable[[], float],
    ) -> None:
        self.plan, self.rules = plan, rules
        self.observer, self.options, self.clock = observer, options, clock
        self.interrupted = False
        self._transport = MeteredTransport(transport, self._take)
        self._probed: dict[str, _Probed] = {}
        for node in nodes:
            kind = rules.kind(node)
            self._probed[node.name] = _Probed(node, kind, withheld(plan, kind))
        self._answers: dict[str, _Answer] = {}
        self._bundles: dict[tuple[object, ...], Bundle | None] = {}
        self._compared: dict[str, dict[str, str]] = {}
        """Check -> its metric -> full name, of those that are compared between nodes."""
        for name in compared_metrics(rules.catalogue):
            check, _, metric = name.rpartition(".")
            self._compared.setdefault(check, {})[metric] = name

    async def probe(self, stop: asyncio.Event, in_use_by: Mapping[str, str]) -> None:
        try:
            with _collecting_rarely():
                await self._pass(list(self._probed.values()), stop, in_use_by)
                if self.plan.loading and not stop.is_set():
                    await self._pass([one for one in self._probed.values() if not one.ended], stop, None)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.uncancel() > 0:
                raise
            self.interrupted = True
        self.interrupted = self.interrupted or stop.is_set()

    def conclude(
        self, baselines: Mapping[BaselineKey, Baseline]
    ) -> tuple[tuple[NodeVerdict, ...], tuple[Member, ...], tuple[Note, ...]]:
        """Final verdicts in the order of the nodes, what they measured, and what concerns many."""
        for one in self._probed.values():
            if not one.ended:
                if (answer := self._answers.pop(one.node.name, None)) is not None:
                    one.records = answer.decoder.records
                left = [check for check in self.plan.checks if check.name not in one.outcomes]
                self._judge(one, left, INTERRUPTED)
        members = [
            Member(one.node.name, one.kind.sku, one.measured, one.node.sku is not None or not one.identified)
            for one in self._probed.values()
            if one.measured or one.identified
        ]
        rules = self.rules.by_metric()
        together = (
            compare_peers(members, rules),
            compare_kinds(members),
            compare_baselines(members, baselines, rules),
        )
        verdicts = []
        for one in self._probed.values():
            for result in together:
                one.findings += result.findings.get(one.node.name, ())
            verdicts.append(self._verdict(one))
        return tuple(verdicts), tuple(members), tuple(note for result in together for note in result.notes)

    async def _pass(
        self, probed: Sequence[_Probed], stop: asyncio.Event, in_use_by: Mapping[str, str] | None
    ) -> None:
        """Run the agent once on each node. `in_use_by` None: the loading checks; else the quiet ones."""
        asked: list[tuple[_Probed, Bundle]] = []
        for one in probed:
            request = self._bundle(one, loading=in_use_by is None)
            if request is None:
                self._pass_ended(one, None, in_use_by)
            else:
                asked.append((one, request))
        work = self._work(asked, stop)
        async with aclosing(fan_out(self._transport, work, self.options.concurrency, None, stop)) as outcomes:
            async for ended in outcomes:
                self._pass_ended(self._probed[ended.node], ended, in_use_by)

    def _work(
        self, asked: Iterable[tuple[_Probed, Bundle]], stop: asyncio.Event
    ) -> Iterator[tuple[Node, Command]]:
        """Commands, each made at the moment when its node's turn comes."""
        for one, request in asked:
            nonce = fresh_nonce()
            self._answers[one.node.name] = _Answer(Decoder(nonce, request.checks))
            limits = replace(
                self.options.limits, command=request.budget + SECONDS_AFTER_BUDGET, stdout_bytes=KEPT_BYTES
            )
            if not stop.is_set():
                self.observer.node_started(one.node.name)
            argv = request.argv(nonce, one.node.python)
            yield one.node, Command(argv, request.payload, limits, self_watching=True)

    def _take(self, name: str, data: bytes) -> bool:
        answer = self._answers.get(name)
        if answer is None:
            return False
        answer.bytes += len(data)
        for record in answer.decoder.feed(data, self.clock()):
            self.observer.record(name, record)
        return answer.bytes <= OUTPUT_BYTES

    def _pass_ended(self, one: _Probed, ended: Ended | None, in_use_by: Mapping[str, str] | None) -> None:
        """Take in what a node said. `ended` None: there was nothing to ask it."""
        failure = None
        answer = self._answers.pop(one.node.name, None)
        if ended is not None and answer is not None:
            one.seconds += ended.seconds
            one.records = answer.decoder.records
            self._meet(one, answer.decoder.hello, ended)
            one.findings += judge_ending(answer.decoder.clean)
            failure = failure_of(
                ended,
                python=one.node.python,
                greeted=bool(answer.decoder.hello),
                done=answer.decoder.done,
                flooded=answer.bytes > OUTPUT_BYTES,
            )
        if in_use_by is None:
            self._judge(one, self.plan.loading, failure)
        elif failure is not None:
            self._identify(one)
            self._judge(one, self.plan.checks, failure)
        else:
            self._identify(one)
            self._withhold(one, in_use_by.get(one.node.name, ""))
            self._judge(one, self.plan.quiet, None)
            if self._bundle(one, loading=True) is not None:
                return
            self._judge(one, self.plan.loading, None)
        one.ended = True
        self.observer.node_done(self._verdict(one))

    def _meet(self, one: _Probed, hello: Mapping[str, Value], ended: Ended) -> None:
        """Note how far the clock of a node is off that is met for the first time."""
        sent, offset = hello.get("time"), hello.get("clock_offset")
        if one.met or not isinstance(sent, int | float) or not isinstance(offset, int | float):
            return
        one.met = True
        one.findings += judge_clock(clock_offset(sent, sent - offset, ended.started_at))

    def _identify(self, one: _Probed) -> None:
        """Judge the node as what its accelerators show it to be, where the inventory does not say it."""
        record = one.records.get(COUNT_CHECK)
        one.identified = record is not None and record.status is Status.ANSWERED
        one.kind = self.rules.kind(one.node, pci_ids(one.records.values()))
        one.left_out.update(withheld(self.plan, one.kind))
        one.findings += judge_kind(one.kind)

    def _withhold(self, one: _Probed, by_ledger: str) -> None:
        """Take away what must not be done to a node in use, and what says nothing about one."""
        reason = (
            f"the node is in use: {by_ledger}" if by_ledger else in_use(self.rules.catalogue, one.records)
        )
        if reason and not self.plan.load_in_use:
            for check in self.plan.loading:
                one.left_out.setdefault(check.name, reason)
        if by_ledger:
            for check in self.plan.quiet:
                if IDLE_TAG in check.spec.tags:
                    one.left_out.setdefault(check.name, f"the node is in use: {by_ledger}")
        if all(check.name in one.left_out for check in self.plan.loading if check.name != WATCH_CHECK):
            one.left_out.setdefault(WATCH_CHECK, "nothing loads this node")

    def _judge(self, one: _Probed, checks: Sequence[Check], failure: Failure | None) -> None:
        """Turn the records of these checks into outcomes and findings, and let go of the records."""
        report = NodeReport(one.node.name, one.kind.sku, one.records)
        if failure is not None:
            report = replace(
                report,
                failure=failure.message,
                failure_phase=failure.check,
                failure_ending="timeout" if failure.timeout else "",
                failure_action=failure.action,
            )
        judgement = judge_report(report, one.kind, [check.name for check in checks], one.left_out)
        one.outcomes.update(judgement.outcomes)
        one.findings += judgement.findings
        for record in one.records.values():
            compared = self._compared.get(record.check)
            if compared is None or record.check not in judgement.outcomes:
                continue
            for measure in record.measures:
                name = compared.get(measure.metric)
                if name is not None:
                    device, value = measure.device, measure.value
                    one.measured.setdefault(name, []).append(
                        (
                            None if device is None else sys.intern(device),
                            sys.intern(value) if isinstance(value, str) else value,
                        )
                    )
        one.records = {}

    def _verdict(self, one: _Probed) -> NodeVerdict:
        return fold(
            one.node.name,
            one.outcomes,
            one.findings,
            sku=one.kind.sku,
            seconds=one.seconds,
        )

    def _bundle(self, one: _Probed, *, loading: bool) -> Bundle | None:
        """What the node is asked in this pass; None if nothing. One payload serves all nodes alike."""
        params = self.rules.params(one.node, one.kind)
        left_out = frozenset(one.left_out)
        key = (loading, one.node.sku is None, left_out, repr(params) if params else "")
        if key not in self._bundles:
            self._bundles[key] = self._make_bundle(one, params, loading)
        return self._bundles[key]

    def _make_bundle(
        self, one: _Probed, params: Mapping[str, Mapping[str, object]], loading: bool
    ) -> Bundle | None:
        chosen = self.plan.loading if loading else (*self.plan.quiet, *self._aids(one.node))
        requests = [
            check_request(check.name, check.spec, params.get(check.name))
            for check in chosen
            if check.name not in one.left_out and check.name != WATCH_CHECK
        ]
        if not requests:
            return None
        if not loading:
            return bundle(requests, budget=self.options.quiet_budget)
        watch = None
        if WATCH_CHECK in self.plan.names and WATCH_CHECK not in one.left_out:
            unwatched = {*one.left_out, *self.plan.excluded}
            watch = watch_request(self.rules.catalogue, unwatched, params)
        budget = sum(request.timeout for request in requests) + self.options.load_margin
        return bundle(requests, watch, budget=budget)

    def _aids(self, node: Node) -> list[Check]:
        """Checks that are not of the plan and that it needs: what the node is, and whether somebody
        works there."""
        known = self.rules.catalogue.checks
        needed = [known[COUNT_CHECK]] if node.sku is None and COUNT_CHECK in known else []
        if self.plan.loading and not self.plan.load_in_use:
            needed += occupancy_checks(self.rules.catalogue)
        return [check for check in needed if check.name not in self.plan.names]


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECT_AFTER) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
