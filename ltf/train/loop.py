"""The training loop: step after step until the run is done, told to end, or stopped by a guard."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ltf import events, metrics, noise
from ltf.balance import even
from ltf.checkpoint.saver import LeaveTraining, Stopped
from ltf.config.schema import Config
from ltf.data.loader import Batch
from ltf.events import Phase
from ltf.findings import Finding, Severity
from ltf.guard import finite
from ltf.guard.drill import Drill, armed, orders_from
from ltf.guard.replay import Replay
from ltf.guard.watch import Watch
from ltf.model.experts import Experts
from ltf.model.moe import MoE
from ltf.optim import learning_rate
from ltf.parallel.norms import clip_, parameter_norms
from ltf.parallel.world import World
from ltf.passes import Passed, Totals
from ltf.timing import OwnWork
from ltf.train.assembly import Model, assemble
from ltf.train.checkpoints import Checkpoints
from ltf.train.decide import Decision, Outcome, Past, decide
from ltf.train.feed import Feed
from ltf.train.measure import Measured, measure
from ltf.train.reading import (
    Share,
    check_first_weights,
    micro_batches_of_a_step,
    open_evaluation,
    open_training,
)
from ltf.train.report import Report
from ltf.train.together import together
from ltf.train.watches import Watches


class GuardStopped(LeaveTraining):
    """A guard's finding ends the run, as the configuration asks; on all ranks alike."""


@dataclass(frozen=True)
class Verdict:
    """What the guards make of a step. `measured` and `passed` are of the gradients that are to be used."""

    decision: Decision
    measured: Measured
    findings: tuple[Finding, ...]
    replayed: bool


class Trainer:
    """Made by all ranks together; `run` trains. DataError, LoadError and others where it cannot begin."""

    def __init__(self, config: Config, world: World, report: Report) -> None:
        self.config, self.world, self.report = config, world, report
        orders = together(world, lambda: orders_from(os.environ))
        together(world, lambda: check_first_weights(config))
        best_fit = config.data.packing == "best_fit"
        loader = together(world, lambda: open_training(config), first_alone=best_fit)
        judged = together(world, lambda: open_evaluation(config), first_alone=best_fit)
        self.feed = Feed(loader, world.device)
        self.judge = None if judged is None else Feed(judged, world.device)
        self.model = assemble(config, world, elsewhere=self._elsewhere, between=self._between_micro_batches)
        timed = timed_modules(self.model, compiled=config.parallel.compile)
        self.own = OwnWork(timed, world.device, uneven=uneven(timed) if world.layout.expert > 1 else ())
        drill = Drill(orders, world.rank) if orders else None
        if drill is not None:
            drill.slow_down(timed[0])
        self.watches = Watches(config, world.layout)
        self.watch = Watch(
            self.model.parts,
            config.model.layers,
            finite=config.guard.finite.enabled,
            corruption=config.guard.corruption.enabled,
            state=self._optimizer_state,
            drill=drill,
        )
        self.replay = Replay(self.model.passes, self.watch, world)
        self.checkpoints = Checkpoints(config, world, self.model, report)
        self.progress = self.checkpoints.resume()
        self.watches.restore(self.progress.watches)
        self.non_finite_in_a_row = 0
        report.findings(armed(orders, self.progress.step))
        self._share_out()

    def run(self) -> None:
        """Stopped when told to end, GuardStopped by a finding, GaveUp when nothing can be saved any more."""
        steps = self.config.run.steps
        self.report.started(self.progress.step)
        with ExitStack() as stack:
            stack.callback(self._close_feeds)
            stack.enter_context(self.checkpoints)
            collection = stack.enter_context(noise.SteadyCollection(self.config.noise.gc_every_steps))
            self.checkpoints.finished_update(self.progress)
            # What a run without interruption does at the end of the step; checkpoints are made before it.
            self._replan()
            while self.progress.step < steps:
                self._step(collection)
            self.report.heart.enter(Phase.CHECKPOINT, self.progress.step)
            self.checkpoints.finish()
            self.report.say(f"done: {steps} steps{self.checkpoints.where_it_is()}")

    def _step(self, collection: noise.SteadyCollection) -> None:
        began = time.perf_counter()
        number = self.progress.step + 1
        self.report.heart.enter(Phase.STEP, self.progress.step)
        batches = self.feed.take(self.progress.next_sample, self.share.assignment)
        totals = self._totals(self.feed.loss_tokens)
        verdict = self._compute(number, batches, totals)
        stall = self.checkpoints.before_update()
        rate = self._act(verdict, totals)
        stall += self.checkpoints.finished_update(self.progress)
        self.checkpoints.poll()
        collected = collection.after(self.progress.step)
        seconds = time.perf_counter() - began
        self._tell(verdict, totals, rate, seconds=seconds, stall=stall, collected=collected)
        if verdict.decision.outcome is Outcome.STOP:
            raise GuardStopped(verdict.decision.reason, 1)
        self._evaluate()
        self._replan()

    def _totals(self, loss_tokens: int) -> Totals:
        """Of the whole batch: every loss is divided by what all ranks have together. `loss_tokens`: here."""
        # The stages of one pipeline read the same batches; one of them counts.
        counts = self.world.layout.place(self.world.rank).pipeline == 0
        [everywhere] = [sum(row) for row in zip(*self.world.gather([loss_tokens * counts]), strict=True)]
        samples = self.config.batch.samples
        return Totals(
            # A batch of padding alone has no label; its loss is then 0, not 0 / 0.
            loss_tokens=max(1, int(everywhere)),
            tokens=samples * self.config.data.seq_len,
            rows=samples,
            counts=self.model.loads.before(),
        )

    def _compute(self, number: int, batches: list[Batch], totals: Totals) -> Verdict:
        """The passes, what the guards find in them, and the passes again where they have a suspicion.

        `number`: of the step, counted from 1.
        """
        guard = self.config.guard
        every = guard.corruption.every_steps
        due = guard.corruption.enabled and every is not None and number % every == 0
        self.watch.begin(number, digests=due)
        passed = self.model.passes(batches, totals)
        report = self.watch.finish(passed)
        measured = self._measure(passed, report)
        findings = self._look(number, measured)
        suspicion = next((f for f in findings if f.kind.startswith(("finite.", "spike."))), None)
        suspected = guard.corruption.enabled and guard.corruption.on_suspicion and suspicion is not None
        trusted = True
        if due or suspected:
            self.report.heart.enter(Phase.REPLAY, self.progress.step)
            outcome = self.replay(
                number, batches, totals, passed, suspicion=suspicion, partner=guard.corruption.partner
            )
            self.own.take()
            trusted = outcome.trusted
            if outcome.repaired:
                measured = replace(self._measure(outcome.passed, finite.Report()), own=measured.own)
                # What was seen stays told; it is no longer a reason to do anything.
                findings = [_repaired(f) if f is suspicion and trusted else f for f in findings]
            findings += [outcome.finding] if outcome.finding is not None else []
        else:
            findings += self.watches.speed(number, measured.own)
        past = Past(
            self.non_finite_in_a_row, len(self.progress.roll_backs), self.checkpoints.any_good, trusted
        )
        return Verdict(decide(findings, guard, past), measured, tuple(findings), due or suspected)

    def _measure(self, passed: Passed, report: finite.Report) -> Measured:
        return measure(
            self.model, passed, self.own.take(), report, self.world, layers=self.config.model.layers
        )

    def _look(self, number: int, measured: Measured) -> list[Finding]:
        """What the numbers of a step say by themselves."""
        layout = self.world.layout
        broken = finite.attribute(
            number,
            measured.reports,
            [layout.unit(rank) for rank in range(layout.world)],
            layers=self.config.model.layers,
            expert=layout.expert,
            norm=measured.norms.total,
        )
        if broken is not None:
            return [broken]
        found = self.watches.spikes.look(number, measured.loss, measured.norms.total, measured.norms.layers)
        collapse = self.config.guard.collapse
        if collapse.enabled and number % collapse.every_steps == 0:
            norms = parameter_norms(self.model.parameters, self.world, self.config.model.layers)
            found += self.watches.collapse.look(number, norms.layers)
        return found

    def _act(self, verdict: Verdict, totals: Totals) -> float:
        """Change the state, or leave it; the learning rate of the step."""
        outcome = verdict.decision.outcome
        self.report.findings(verdict.findings)
        settings = self.config.optimizer
        rate = learning_rate(self.progress.step, self.config.run.steps, settings)
        broken = any(
            finding.kind.startswith("finite.") and finding.severity is not Severity.INFO
            for finding in verdict.findings
        )
        self.non_finite_in_a_row = self.non_finite_in_a_row + 1 if broken else 0
        if outcome is Outcome.UPDATE:
            if settings.clip is not None:
                clip_(self.model.parameters, verdict.measured.norms.total, settings.clip)
            for group in self.model.optimizer.param_groups:
                group["lr"] = rate
            self.model.optimizer.step()
            self.model.loads.take(verdict.measured.counts)
        self.model.optimizer.zero_grad(set_to_none=True)
        if outcome is Outcome.ROLL_BACK:
            self.report.heart.enter(Phase.CHECKPOINT, self.progress.step)
            self.progress = self.checkpoints.roll_back(self.progress)
            self.watches.restore(self.progress.watches)
            self._share_out()
        else:
            self.progress = self.progress.after_step(
                totals.rows, totals.tokens, skipped=outcome is not Outcome.UPDATE
            )
        self.progress = replace(self.progress, watches=self.watches.state())
        return rate

    def _tell(
        self,
        verdict: Verdict,
        totals: Totals,
        rate: float,
        *,
        seconds: float,
        stall: float,
        collected: float | None,
    ) -> None:
        measured = verdict.measured
        tokens_per_second = totals.tokens / seconds
        self.report.step(
            events.Step(
                step=self.progress.step,
                loss=measured.loss,
                tokens=totals.tokens,
                seconds=seconds,
                loss_tokens=totals.loss_tokens,
                gradient_norm=measured.norms.total,
                lr=rate,
                skipped=verdict.decision.outcome is not Outcome.UPDATE,
                tokens_per_second=tokens_per_second,
                mfu=self.report.mfu(tokens_per_second),
                memory_bytes=metrics.memory(self.world.device).peak,
                data_stall_seconds=self.feed.stalled(),
                checkpoint_stall_seconds=stall,
                gc_seconds=collected,
                balance_loss=measured.balance,
                z_loss=measured.z,
                expert_load=measured.fullest,
                own_seconds=tuple(each.seconds for each in measured.own),
                layer_gradient_norms={str(i): norm for i, norm in measured.norms.layers.items()},
            )
        )

    def _evaluate(self) -> None:
        settings, step = self.config.data.evaluation, self.progress.step
        if self.judge is None or settings is None or step % settings.every_steps:
            return
        began = time.perf_counter()
        self.report.heart.enter(Phase.EVALUATION, step)
        loss = 0.0
        for number in range(settings.batches):
            batches = self.judge.take(number * self.config.batch.samples, self.evenly.assignment)
            totals = self._totals(self.judge.loss_tokens)
            share = float(self.model.passes.evaluate(batches, totals))
            loss += sum(row[0] for row in self.world.gather([share])) / settings.batches
        tokens = settings.batches * self.config.batch.samples * self.config.data.seq_len
        self.report.evaluation(events.Evaluation(step, loss, tokens, time.perf_counter() - began))

    def _replan(self) -> None:
        plan = self.watches.replan(self.progress.step)
        if plan is not None:
            self._share_out()
            self.report.event(
                events.Balance(
                    plan.step, plan.counts, plan.counts_before, plan.seconds_before, plan.seconds_after
                )
            )

    def _share_out(self) -> None:
        """Who takes what from now on."""
        layout, rank, micro = self.world.layout, self.world.rank, self.config.batch.micro
        total = micro_batches_of_a_step(self.config, layout)
        self.share = Share(layout, rank, micro, self.watches.balancer.counts)
        self.evenly = Share(layout, rank, micro, even(total, layout.units))

    def _elsewhere(self) -> AbstractContextManager[None]:
        return self.own.elsewhere()

    def _between_micro_batches(self) -> None:
        self.report.heart.advance()
        if self.checkpoints.stopping:
            # The state before this step is copied, and nobody needs this rank for it any more.
            raise Stopped("told to end in the middle of a step", self.checkpoints.saver.stop_status)

    def _optimizer_state(self) -> list[Tensor]:
        found = (value for state in self.model.optimizer.state.values() for value in state.values())
        return [value for value in found if isinstance(value, Tensor)]

    def _close_feeds(self) -> None:
        self.feed.close()
        if self.judge is not None:
            self.judge.close()


def _repaired(finding: Finding) -> Finding:
    return replace(
        finding,
        severity=Severity.INFO,
        message=f"{finding.message} (repaired: the replay did not show it again)",
    )


def timed_modules(model: Model, *, compiled: bool) -> list[nn.Module]:
    """What the stopwatch of own work looks at: parts of a layer that wait for nobody.

    Inside a compiled layer nothing can be timed, so there it is the layer, its exchange taken out.
    """
    blocks = [block for part in model.parts for _, block in part.blocks()]
    if compiled:
        return list(blocks)
    modules: list[nn.Module] = []
    for block in blocks:
        modules.append(block.attention)
        if isinstance(block.ffn, MoE):
            shared = [block.ffn.shared] if block.ffn.shared is not None else []
            modules += [block.ffn.router, block.ffn.experts, *shared]
        else:
            modules.append(block.ffn)
    return modules


def uneven(timed: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that do work for other ranks, as much as the tokens' choice of experts makes it."""
    return [module for module in timed if any(isinstance(part, Experts) for part in module.modules())]
