"""What supervising a job is about: faults, attempts, what is left to spend, nodes, checkpoints, decisions.

All are frozen values that go to JSON and back exactly (`recovery.supervise.stored`). Times are seconds since
1970-01-01 UTC by the supervisor's clock, steps count from 1, ranks and attempts from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from probes.model import Verdict
from recovery.blame import Blame


class Proof(StrEnum):
    """What says that the named nodes are the culprits. Which of these replace a node: `EVICTING`."""

    NONE = "none"
    EXIT = "exit"
    """An exit status or a traceback tells which rank broke; that its node did is not shown."""
    GUARD = "guard"
    """The trainer's own check of results or speed names the ranks."""
    PROBE = "probe"
    KERNEL_LOG = "kernel_log"
    WAIT_FOR = "wait_for"
    """All others wait for these ranks, and they wait for nobody."""
    UNREACHABLE = "unreachable"
    """Consecutive misses over a stated time."""


EVICTING = frozenset({Proof.GUARD, Proof.PROBE, Proof.KERNEL_LOG, Proof.WAIT_FOR, Proof.UNREACHABLE})


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was seen. `source`: what saw it, such as ``exit``, ``kernel_log``, ``events``."""

    source: str
    text: str
    time: float | None = None
    node: str | None = None
    rank: int | None = None
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What broke, and what shows it."""

    kind: str
    """Dotted and stable, such as ``rank.killed``."""
    blame: Blame
    message: str
    """One sentence with the values and limits that led to it."""
    ranks: tuple[int, ...] = ()
    """The ranks that broke, not those that followed."""
    nodes: tuple[str, ...] = ()
    """Proven culprits, by `proof`."""
    suspects: tuple[str, ...] = ()
    """Nodes of which one may be to blame; to be probed. Nothing is proven about them."""
    proof: Proof = Proof.NONE
    place: str | None = None
    """Where, in whose code: ``file:line ExceptionType``; by it a repetition is told."""
    step: int | None = None
    retryable: bool = True
    """False: another start can only end the same way."""
    ends: bool = True
    """False: training goes on with it."""
    diagnose: bool = False
    """Collect stacks and flight recorder dumps before anything is killed."""
    first_seen: float | None = None
    consequences: int = 0
    """Other failures that only followed from this one."""
    evidence: tuple[Evidence, ...] = ()

    @property
    def convicted(self) -> tuple[str, ...]:
        """The nodes that this fault is proof against. A user's error is none, whatever it names."""
        return self.nodes if self.proof in EVICTING and self.blame is not Blame.USER else ()


class Ending(StrEnum):
    """How an attempt ended. FINISHED: every rank with status 0. STOPPED: as the job was asked to stop."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of all ranks."""

    number: int
    nodes: tuple[str, ...]
    """The node of each rank; a node comes as often as it has ranks."""
    started: float
    ending: Ending | None = None
    """None: it runs."""
    ended: float | None = None
    first_step_at: float | None = None
    resumed_from: int | None = None
    """Step of the checkpoint that it went on from; None: from the beginning, or not known."""
    last_step: int | None = None
    """The last that was done; None: none was, or the trainer does not tell."""
    durable_step: int | None = None
    """Newest step that a saved checkpoint of this attempt holds."""
    tells_steps: bool = True
    """False: the trainer writes no events, so that progress shows in running time alone."""
    faults: tuple[Fault, ...] = ()
    """The first is the root."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the job has spent so far. What it may spend is in the policy's settings."""

    attempts: int = 0
    lost_seconds: float = 0.0
    """By all causes: whatever was not productive."""
    waiting_since: float | None = None
    """When it began to wait for nodes; None: it does not wait."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A node that was probed since the last attempt ended. `tries`: how often, all without an answer but the
    last. `thorough`: by the comprehensive plan."""

    node: str
    verdict: Verdict
    tries: int = 1
    thorough: bool = False
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class Out:
    """A node that may not be used, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class FleetView:
    """The nodes that matter to this job."""

    nodes: tuple[str, ...]
    """That the job has now, one entry each; fewer than `needed` after a loss that nothing replaced yet."""
    needed: int
    spares: tuple[str, ...] = ()
    """Reserved for this job and validated; the nearest first."""
    unvalidated: tuple[str, ...] = ()
    """Spares without a fresh verdict."""
    out: tuple[Out, ...] = ()
    probed: tuple[Probed, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """A saved checkpoint. `good`: complete and verified, not quarantined. `failures`: verifications or loads
    of it that failed."""

    step: int
    good: bool = True
    failures: int = 0


class DecisionKind(StrEnum):
    """What to do. Nodes, checkpoint and wait of a decision hold whatever its kind: the kind names the
    farthest-reaching part, a replacement before an older checkpoint before a restart in place."""

    CONTINUE = "continue"
    """Training goes on; nothing ends it."""
    RESTART = "restart"
    REPLACE = "replace"
    ROLL_BACK = "roll_back"
    """Restart from an older checkpoint than the newest."""
    PROBE = "probe"
    """Probe `probe_nodes` in parallel, then decide again."""
    WAIT = "wait"
    """For nodes; then decide again."""
    STOP = "stop"


STARTS = frozenset({DecisionKind.RESTART, DecisionKind.REPLACE, DecisionKind.ROLL_BACK})
"""What begins another attempt."""


class StopCause(StrEnum):
    """Why a job stops for good."""

    DONE = "done"
    ASKED = "asked"
    """A person, or what started the job, said so."""
    USER = "user"
    NO_PROGRESS = "no_progress"
    BUDGET = "budget"
    PLATFORM = "platform"
    """The nodes or the checkpoints that it needs are not there."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next, and why. `reason` has the rule in words and its numbers; `rule` is its stable name."""

    kind: DecisionKind
    rule: str
    reason: str
    cause: StopCause | None = None
    """Of a STOP."""
    nodes_out: tuple[str, ...] = ()
    nodes_in: tuple[str, ...] = ()
    checkpoint: int | None = None
    """Step to go on from; None: from the beginning, or, when nothing starts, nothing."""
    quarantine: tuple[int, ...] = ()
    """Checkpoints, by step, that are not to be used again."""
    wait_seconds: float = 0.0
    """Before it is done; of a WAIT: before deciding again."""
    probe_nodes: tuple[str, ...] = ()
    """The most suspicious first."""
    thorough: tuple[str, ...] = ()
    """Those of `probe_nodes` that get the comprehensive plan."""
    tried: tuple[str, ...] = ()
    """Of a STOP: the attempts that led to it, a line each."""
    evidence: tuple[Evidence, ...] = ()
