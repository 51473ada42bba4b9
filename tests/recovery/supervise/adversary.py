"""A world that means ill: it breaks every attempt as it likes, until the policy gives up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from random import Random

from probes.model import Verdict
from recovery.blame import Blame
from recovery.supervise.model import (
    STARTS,
    Attempt,
    Budget,
    CheckpointView,
    Decision,
    DecisionKind,
    Ending,
    Evidence,
    Fault,
    FleetView,
    Out,
    Probed,
    Proof,
)
from recovery.supervise.policy import decide
from recovery.supervise.settings import Probing, Settings
from recovery.supervise.stored import from_json, to_json

PROOFS_THAT_EVICT = {"guard", "probe", "kernel_log", "wait_for", "unreachable"}
POOL = [f"n{i}" for i in range(10)]
DECISIONS_AN_ATTEMPT = 400
"""More than probing every node twice, waiting an hour in the shortest steps, and starting, can take."""


class World:
    """One job's whole life. `run` checks each decision against what must never happen."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 1_700_000_000.0
        self.settings = self._settings()
        self.needed = self.random.randint(1, 4)
        self.nodes = POOL[: self.needed]
        rest = POOL[self.needed :]
        cut = self.random.randint(0, len(rest))
        self.spares, self.unvalidated = rest[:cut], rest[cut : self.random.randint(cut, len(rest))]
        self.out: list[Out] = []
        self.probed: dict[str, Probed] = {}
        self.history: list[Attempt] = []
        self.faults: list[Fault] = []
        self.checkpoints: list[CheckpointView] = []
        self.lost = 0.0
        self.waiting_since: float | None = None
        self.best = 0
        self.temper = self.random.choice(["never steps", "always one more", "anything"])
        self.kinds: Counter[str] = Counter()

    def run(self) -> Decision:
        for _ in range(self.settings.max_attempts * DECISIONS_AN_ATTEMPT):
            decision = self._decide()
            self.kinds[decision.kind] += 1
            if decision.kind is DecisionKind.STOP:
                return decision
            self._apply(decision)
        raise AssertionError("the policy goes on for ever")

    def _decide(self) -> Decision:
        budget = Budget(len(self.history), self.lost, self.waiting_since)
        fleet = FleetView(
            tuple(self.nodes),
            self.needed,
            tuple(self.spares),
            tuple(self.unvalidated),
            tuple(self.out),
            tuple(self.probed.values()),
        )
        inputs = (
            tuple(self.history),
            tuple(self.faults),
            budget,
            fleet,
            tuple(self.checkpoints),
            self.settings,
            self.now,
        )
        decision = decide(*inputs)
        assert decide(*inputs) == decision, "the same input gave another decision"
        assert from_json(Decision, json.loads(json.dumps(to_json(decision)))) == decision
        self._judge(decision)
        return decision

    def _judge(self, decision: Decision) -> None:
        assert len(decision.reason) > 10
        assert decision.rule
        assert (decision.cause is not None) == (decision.kind is DecisionKind.STOP)
        guilty = {
            n
            for f in self.faults
            if f.proof in PROOFS_THAT_EVICT and f.blame is not Blame.USER
            for n in f.nodes
        }
        guilty |= {n for n, p in self.probed.items() if p.verdict is Verdict.UNHEALTHY}
        away = {each.node for each in self.out}
        assert set(decision.nodes_out) <= (guilty | away) & set(self.nodes), "evicted without proof"
        passed = {n for n in self.unvalidated if n in self.probed and self.probed[n].verdict.value in GOOD}
        free = (set(self.spares) | passed) - away - set(self.nodes)
        assert set(decision.nodes_in) <= free, "took a node that is no validated spare"
        assert len(set(decision.nodes_in)) == len(decision.nodes_in)
        left = self.settings.max_lost_seconds - self.lost
        assert 0 <= decision.wait_seconds <= max(left, 0), "overdraws the lost time"
        if decision.kind is DecisionKind.WAIT:
            assert decision.wait_seconds > 0
        if decision.kind is DecisionKind.PROBE:
            assert decision.probe_nodes
            assert not set(decision.probe_nodes) & away
        if decision.kind in STARTS:
            self._judge_start(decision, away)

    def _judge_start(self, decision: Decision, away: set[str]) -> None:
        then = (set(self.nodes) - set(decision.nodes_out)) | set(decision.nodes_in)
        assert len(then) >= self.needed, "starts on fewer nodes than the job needs"
        assert not then & away, "starts on a node that is out"
        assert len(self.history) < self.settings.max_attempts
        since = self.now - self.settings.window_seconds
        assert sum(a.started > since for a in self.history) < self.settings.attempts_per_window
        assert self.lost < self.settings.max_lost_seconds
        good = {view.step for view in self.checkpoints if view.good}
        assert decision.checkpoint is None or decision.checkpoint in good
        assert set(decision.quarantine) <= good - {decision.checkpoint}

    def _apply(self, decision: Decision) -> None:
        match decision.kind:
            case DecisionKind.PROBE:
                self._probe(decision.probe_nodes)
            case DecisionKind.WAIT:
                if self.waiting_since is None:
                    self.waiting_since = self.now
                self._pass(decision.wait_seconds)
                self._something_happens_to_the_fleet()
            case DecisionKind.CONTINUE:
                self._end(self.history[-1])
            case _:
                self._start(decision)

    def _probe(self, nodes: tuple[str, ...]) -> None:
        for node in nodes:
            before = self.probed[node].tries if node in self.probed else 0
            verdict = self.random.choice(list(Verdict))
            self.probed[node] = Probed(node, verdict, before + 1)
        self._pass(self.random.uniform(0, 30))

    def _something_happens_to_the_fleet(self) -> None:
        if self.random.random() < 0.1:
            fresh = f"x{self.random.randint(0, 99)}"
            self.random.choice([self.spares, self.unvalidated]).append(fresh)
        if self.random.random() < 0.05:
            self.out.append(Out(self.random.choice(POOL), "cordoned by ops"))

    def _start(self, decision: Decision) -> None:
        self._pass(decision.wait_seconds)
        self.nodes = [n for n in self.nodes if n not in decision.nodes_out] + list(decision.nodes_in)
        self.out += [Out(node, "replaced") for node in decision.nodes_out]
        self.spares = [n for n in self.spares if n not in decision.nodes_in]
        self.unvalidated = [n for n in self.unvalidated if n not in decision.nodes_in]
        self.checkpoints = [
            replace(view, good=view.good and view.step not in decision.quarantine)
            for view in self.checkpoints
        ]
        self.waiting_since, self.probed = None, {}
        self.history.append(
            Attempt(len(self.history), tuple(self.nodes), self.now, resumed_from=decision.checkpoint)
        )
        self._train(decision.checkpoint or 0)
        self._something_happens_to_the_fleet()

    def _train(self, start: int) -> None:
        self._pass(self.random.choice([1, 600, 4000]), lost=self.random.random())
        reached: int | None
        match self.temper:
            case "never steps":
                reached = None
            case "always one more":
                reached = self.best + 1
            case _:
                reached = self.random.choice(
                    [None, start + 1, self.best, self.best + self.random.randint(1, 50)]
                )
        durable = None if reached is None else self.random.choice([None, reached])
        if durable is not None:
            self.checkpoints.append(CheckpointView(durable, self.random.random() < 0.9))
            self.checkpoints = list({view.step: view for view in self.checkpoints}.values())
        self.best = max(self.best, reached or 0)
        running = self.random.random() < 0.2
        self.faults = [self._fault() for _ in range(self.random.choice([0, 1, 1, 1, 2, 3]))]
        told = self.random.random() < 0.9
        self.history[-1] = replace(
            self.history[-1],
            last_step=reached if told else None,
            durable_step=durable if told else None,
            tells_steps=told,
            faults=tuple(self.faults),
        )
        if not running:
            self._end(self.history[-1])

    def _end(self, attempt: Attempt) -> None:
        self.history[-1] = replace(attempt, ended=self.now, ending=Ending.FAILED)

    def _fault(self) -> Fault:
        pick = self.random.choice
        some = tuple(self.random.sample(POOL, self.random.randint(0, 2)))
        return Fault(
            kind=pick(["rank.killed", "code.exception", "checkpoint.load", "hang", "port.taken"]),
            blame=pick(list(Blame)),
            message="it broke",
            nodes=some,
            suspects=tuple(self.random.sample(POOL, self.random.randint(0, 2))),
            proof=pick(list(Proof)),
            place=pick([None, "a.py:1 ValueError", "b.py:2 KeyError"]),
            step=pick([None, 5]),
            retryable=self.random.random() < 0.9,
            ends=self.random.random() < 0.85,
            evidence=(Evidence("exit", "status 137", self.now, rank=1),),
        )

    def _pass(self, seconds: float, lost: float = 1.0) -> None:
        self.now += seconds
        self.lost += seconds * lost

    def _settings(self) -> Settings:
        pick = self.random.choice
        return Settings(
            max_attempts=self.random.randint(1, 25),
            attempts_per_window=self.random.randint(1, 25),
            window_seconds=pick([600.0, 86_400.0]),
            max_lost_seconds=pick([60.0, 7200.0, 1e6]),
            user_retries=self.random.randint(0, 2),
            no_progress_attempts=self.random.randint(1, 5),
            no_checkpoint_attempts=self.random.randint(1, 20),
            start_over=pick([True, False]),
            wait_for_nodes_seconds=pick([0.0, 100.0, 3600.0]),
            probing=pick(list(Probing)),
            probe_tries=self.random.randint(1, 3),
        )


GOOD = {"healthy", "degraded"}
