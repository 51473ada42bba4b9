"""A job's restart policy: how often, how long, and what before it gives up. Every value has its default."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum


class Probing(StrEnum):
    """When the nodes of a fault that nothing explains are probed before the restart. REPEAT: from the
    second such fault of the job on. Candidates that a guard names are probed unless it is NEVER."""

    ALWAYS = "always"
    REPEAT = "repeat"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Settings:
    """A job file's restart policy. Times in seconds."""

    max_attempts: int = 1000
    """Starts in all, the first included. High, as months on thousands of devices see hundreds of
    interruptions (Llama 3: 419 in 54 days); endless loops are caught by the rules on progress long before."""
    attempts_per_window: int = 30
    """Starts within any `window_seconds`, by default a day: four times Llama 3's rate."""
    window_seconds: float = 86_400.0
    max_lost_seconds: float = 7 * 86_400.0
    """That were not productive, by all causes, before the job gives up."""
    user_retries: int = 1
    """Restarts after a user's error that comes back at the same place."""
    no_progress_attempts: int = 3
    """Attempts in a row without a new step that stop the job."""
    no_checkpoint_attempts: int = 10
    """Attempts in a row that did steps but saved none that is new: a job that loses all it does."""
    checkpoint_failures: int = 2
    """After so many, a checkpoint is set aside for an older one."""
    start_over: bool = False
    """Begin at step 0 when checkpoints exist and none is usable, rather than stop for a person to see."""
    backoff_seconds: float = 5.0
    """Before the restart after one attempt without a new step; none after progress or a replacement."""
    backoff_factor: float = 3.0
    """By which it grows with each further one."""
    backoff_cap_seconds: float = 600.0
    wait_for_nodes_seconds: float = 3600.0
    """That it waits for a spare; 0: it stops at once. A job does not run on fewer nodes than it asked for."""
    node_poll_seconds: float = 30.0
    """Between two looks for a spare."""
    probing: Probing = Probing.ALWAYS
    probe_tries: int = 2
    """Probes of a node that did not answer, before it is taken as neither good nor bad."""
    thorough_suspicions: int = 2
    """Attempts in which a node was suspected, from which on it is probed by the comprehensive plan."""
    silent_progress_seconds: float = 1800.0
    """A trainer that tells no steps has made progress when it ran for so long."""

    def __post_init__(self) -> None:
        positive = ("window_seconds", "node_poll_seconds", "silent_progress_seconds", "backoff_factor")
        counts = (
            *("max_attempts", "attempts_per_window", "no_progress_attempts", "no_checkpoint_attempts"),
            *("checkpoint_failures", "probe_tries", "thorough_suspicions"),
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Probing):
                continue
            if field.name in counts and value < 1:
                raise ValueError(f"{field.name}: expected 1 or more, found {value}")
            # Written so that NaN is refused too.
            if not (value > 0 if field.name in positive else value >= 0):
                least = "more than 0" if field.name in positive else "0 or more"
                raise ValueError(f"{field.name}: expected {least}, found {value}")
