"""One validation as the command line runs it: ask the nodes, keep the results, move states, show findings."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inventory.errors import UsageError
from inventory.fleet import Node, NothingInState, fold
from inventory.lifecycle import State, clears, may_load, next_after_validation
from ltpctl.actor import actor
from ltpctl.exits import Exit
from ltpctl.frame import Session, Undetermined, ending_signals, interruptible
from ltpctl.progress import NodeProgress
from ltpctl.reports.files import refuse_unwritable, write_whole
from ltpctl.reports.folding import QUIET
from ltpctl.reports.verdicts import show_verdicts
from ltpctl.times import duration, rfc3339
from ltpctl.wiring import limits, refuse_missing_keys
from probes.catalogue import Catalogue, load_catalogue
from probes.fleetwide import BaselineKey, learn_baselines
from probes.model import NodeVerdict, Verdict
from probes.peers import FEWEST_NUMBERS
from probes.plan import Plan, make_plan
from probes.profiles import RuleBook, load_profiles
from probes.report import measurement_rows, to_json, verdict_row
from probes.validate import Observer, Options, ValidationResult, validate

if TYPE_CHECKING:
    from inventory.ledger import Ledger, NodeState
    from probes.baseline import Baseline
    from probes.catalogue import Level


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    level: Level
    only: tuple[str, ...]
    skip: tuple[str, ...]
    apply: bool
    load_in_use: bool
    concurrency: int
    accept_new: bool
    ledger: bool
    files: Mapping[str, str | None]
    """``--junit`` and ``--html`` -> file to write."""


def catalogue(session: Session) -> Catalogue:
    """The checks that ship and those that the configuration names."""
    return load_catalogue([Path(p).expanduser() for p in session.configuration.settings.validate_.checks])


def rule_book(session: Session, checks: Catalogue) -> RuleBook:
    places = [Path(p).expanduser() for p in session.configuration.settings.validate_.profiles]
    return RuleBook(checks, load_profiles(checks, places))


def run(session: Session, request: Request) -> Exit:
    """Validate, keep, apply, show. What is wrong with the request itself is found before a node is asked."""
    from inventory.ledger.errors import LedgerError

    checks = catalogue(session)
    rules = rule_book(session, checks)
    plan = make_plan(checks, request.level, request.only, request.skip, request.load_in_use)
    try:
        nodes = session.nodes()
    except NothingInState as nothing:
        # For cron: that no node is cordoned today is no mistake.
        session.out.note(f"nothing to validate: {nothing}")
        if session.out.json:
            session.out.document(to_json(ValidationResult(plan, ())))
        return Exit.OK
    rules.check(nodes)
    refuse_missing_keys(nodes)
    for option, file in request.files.items():
        refuse_unwritable(option, file)
    session.found = Exit.UNDETERMINED
    if not request.ledger:
        return _finish(session, request, _ask(session, request, nodes, plan, rules, {}, {}), None, [])
    with session.ledger() as ledger:
        states = ledger.states([node.name for node in nodes])
        in_use = {
            name: f"the ledger says {entry.state}: {entry.reason}".rstrip(": ")
            for name, entry in states.items()
            if not may_load(entry.state, request.load_in_use)
        }
        baselines = _baselines(session, ledger, rules, nodes)
        run_id = ledger.begin_run("validate", str(plan), actor(), fold([node.name for node in nodes]))
        result = _ask(session, request, nodes, plan, rules, baselines, in_use)
        moved: list[tuple[str, str, str]] = []
        try:
            rows = [verdict_row(verdict) for verdict in result.verdicts]
            ledger.record_verdicts(run_id, rows, measurement_rows(result, rules))
            if request.apply and not result.interrupted:
                moved = _apply(ledger, run_id, result, states, whole=not request.only)
                if request.only and any(entry.state is State.NEW for entry in states.values()):
                    session.out.note(
                        "new nodes stay new: --check asks a part of the plan; a whole plan admits them"
                    )
            counts = {str(verdict): count for verdict, count in result.summary.items()}
            ledger.finish_run(
                run_id, {**counts, "interrupted": result.interrupted, "seconds": round(result.seconds, 3)}
            )
        except LedgerError:
            # What took minutes to measure is shown, even if it cannot be kept.
            _finish(session, request, result, None, moved)
            raise
    return _finish(session, request, result, run_id, moved)


def difference(session: Session, run_id: str | None, against: str | None) -> Exit:
    """Show what changed from run `against` to run `run_id`; by default from the last but one to the last."""
    from ltpctl.reports.changes import show_changes
    from probes.difference import diff

    chosen = {node.name for node in session.nodes()} if any(session.selection_options.values()) else None
    with session.ledger(read_only=True) as ledger:
        finished = [r for r in ledger.runs("validate") if r.finished is not None]
        after = ledger.run(run_id) if run_id else (finished[0] if finished else None)
        earlier = [r for r in finished if after is not None and r.started < after.started]
        before = ledger.run(against) if against else (earlier[0] if earlier else None)
        if after is None or before is None:
            raise Undetermined(
                f"the ledger holds {len(finished)} finished validations; two are needed to compare"
            )
        old, new = (
            [row for row in ledger.verdicts(r.id) if chosen is None or row.node in chosen]
            for r in (before, after)
        )
    found = diff(old, new)
    session.found = Exit.FINDINGS if found.worse else Exit.OK
    show_changes(session.out, before, after, found)
    return session.found


def _ask(
    session: Session,
    request: Request,
    nodes: tuple[Node, ...],
    plan: Plan,
    rules: RuleBook,
    baselines: Mapping[BaselineKey, Baseline],
    in_use: Mapping[str, str],
) -> ValidationResult:
    settings = session.configuration.settings.ssh

    async def work() -> ValidationResult:
        from inventory.transport import transport_for

        stop = asyncio.Event()
        loop, asking = asyncio.get_running_loop(), asyncio.current_task()
        assert asking is not None

        def interrupted() -> None:
            # The first time in order: what runs is ended, what is known is shown. The second time at once.
            if stop.is_set():
                asking.cancel()
            stop.set()

        for number in (signal.SIGINT, *ending_signals()):
            loop.add_signal_handler(number, interrupted)
        # Jump hosts are nodes that the selection need not name.
        ssh, fleet = session.ssh_settings(request.accept_new), session.fleet.nodes
        async with transport_for(nodes, ssh, fleet) as transport:
            return await validate(
                nodes,
                plan,
                transport,
                rules,
                baselines=baselines,
                in_use_by=in_use,
                observer=_Watcher(progress),
                options=Options(concurrency=request.concurrency, limits=limits(settings)),
                stop=stop,
            )

    with NodeProgress(session.out, len(nodes)) as progress:
        result = _run_loop(work())
    # The loop took its handlers with it; what follows must not end without a word.
    interruptible()
    return result


def _run_loop(work: Coroutine[None, None, ValidationResult]) -> ValidationResult:
    """On uvloop where it is installed: up to a tenth less CPU in large fan-outs."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.run(work)
    import uvloop

    return uvloop.run(work)


class _Watcher(Observer):
    def __init__(self, progress: NodeProgress) -> None:
        self._progress = progress

    def node_started(self, node: str) -> None:
        self._progress.started(node)

    def node_done(self, verdict: NodeVerdict) -> None:
        shown = [(f.check, f.message) for f in verdict.findings if f.outcome not in QUIET]
        self._progress.done(verdict.node, str(verdict.verdict), shown)


def _baselines(
    session: Session, ledger: Ledger, rules: RuleBook, nodes: tuple[Node, ...]
) -> Mapping[BaselineKey, Baseline]:
    """What each SKU of these nodes usually measures, learned from the days that the configuration names."""
    from time import time

    by_name = rules.by_metric()
    names = [name for name, rule in by_name.items() if rule.baseline is not None]
    since = time() - 86400 * session.configuration.settings.validate_.baseline_days
    history: dict[BaselineKey, dict[str, list[float]]] = {}
    skus = {rules.kind(node).sku for node in nodes}
    if any(node.sku is None for node in nodes):
        # What such a node is it will show by itself, and most likely it is what some node was before.
        skus |= ledger.skus(since)
    for sku in skus:
        for metric, values in ledger.measurements(names, sku, since).items():
            for node, value in values:
                history.setdefault((sku or "", metric), {}).setdefault(node, []).append(value)
    learned, notes = learn_baselines(history, by_name)
    for note in notes:
        session.out.detail(note.message)
    return learned


def _apply(
    ledger: Ledger, run_id: str, result: ValidationResult, states: Mapping[str, NodeState], *, whole: bool
) -> list[tuple[str, str, str]]:
    """Move nodes as their verdicts call for: (node, from, to). One that was moved meanwhile is left alone.

    `whole`: no ``--check`` picked among the checks of the plan. A few that pass do not admit a node that was
    never admitted before.
    """
    moved: list[tuple[str, str, str]] = []
    voices = Counter((member.sku, name) for member in result.members for name in member.measured)
    with ledger.transaction() as turn:
        now = turn.states(list(states))
        for verdict in result.verdicts:
            before = states[verdict.node]
            outcomes = {check: str(outcome) for check, outcome in verdict.checks.items()}
            for finding in _of_peers(before):
                # Who was unlike its peers and is now looked at without them has passed nothing.
                if voices[verdict.sku, f"{finding['check']}.{finding['metric']}"] < FEWEST_NUMBERS:
                    outcomes.pop(finding["check"], None)
            way = next_after_validation(
                before.state, str(verdict.verdict), cleared=clears(before.evidence, outcomes)
            )
            # The same state for another reason is another state: what was cleared is not what counts now.
            if way is None or now[verdict.node] != before:
                continue
            if way.target is State.AVAILABLE and before.state in (State.NEW, State.VALIDATING) and not whole:
                continue
            row = verdict_row(verdict)
            reason = f"validated {verdict.verdict}"
            counting = [finding for finding in verdict.findings if finding.outcome not in QUIET]
            if counting:
                reason += f": {counting[0].check}: {counting[0].message}"
            evidence = {"verdict": row.verdict, "findings": list(row.findings)}
            turn.transition(verdict.node, way.target, actor(), reason, evidence, run=run_id)
            moved.append((verdict.node, str(before.state), str(way.target)))
    return moved


def _of_peers(state: NodeState) -> list[Mapping[str, Any]]:
    """What took the node out, as far as its peers told it."""
    findings = state.evidence.get("findings") or ()
    return [f for f in findings if f.get("source") == "peers" and f.get("outcome") == "fail"]


def _finish(
    session: Session,
    request: Request,
    result: ValidationResult,
    run_id: str | None,
    moved: list[tuple[str, str, str]],
) -> Exit:
    document = to_json(result)
    document["run"] = run_id
    document["transitions"] = [{"node": n, "from": a, "to": b} for n, a, b in moved]
    session.found = _status(result)
    # Before anything is printed: a reader of stdout who leaves early takes no report away.
    unwritten = _write_files(session, request, result, run_id)
    if session.out.json:
        session.out.document(document)
    else:
        show_verdicts(session.out, result, run_id, moved)
    if unwritten:
        raise UsageError("; ".join(unwritten))
    return session.found


def _status(result: ValidationResult) -> Exit:
    if result.interrupted:
        return Exit.INTERRUPTED
    verdicts = {verdict.verdict for verdict in result.verdicts}
    if verdicts == {Verdict.HEALTHY}:
        return Exit.OK
    return Exit.UNDETERMINED if verdicts == {Verdict.UNKNOWN} else Exit.FINDINGS


def _write_files(
    session: Session, request: Request, result: ValidationResult, run_id: str | None
) -> list[str]:
    """Write the reports that were asked for; one line for each that could not be written."""
    texts: dict[str, str] = {}
    if request.files.get("--junit"):
        from ltpctl.reports.junit import junit

        texts["--junit"] = junit(result.verdicts)
    if request.files.get("--html"):
        from ltpctl.reports.page import page

        facts = {
            "started": rfc3339(result.started) or "",
            "plan": str(result.plan),
            "inventory": Path(session.fleet.source).name or session.fleet.name,
            "took": duration(result.seconds),
        }
        if run_id:
            facts["run"] = run_id
        texts["--html"] = page(f"Validation of {session.fleet.name}", result.verdicts, facts)
    unwritten = []
    for option, text in texts.items():
        file = request.files[option] or ""
        try:
            write_whole(Path(file), text)
        except OSError as error:
            unwritten.append(f"{option} {file}: cannot be written: {error.strerror}")
    return unwritten
