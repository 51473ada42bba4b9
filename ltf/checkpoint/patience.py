"""For how long a run goes on while no save works."""

from __future__ import annotations


class Patience:
    """Times in seconds of any one clock. A success forgets what was due before it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.first_due: float | None = None

    def due(self, now: float) -> None:
        """A checkpoint is wanted."""
        if self.first_due is None:
            self.first_due = now

    def worked(self) -> None:
        self.first_due = None

    def waited(self, now: float) -> float:
        """Since a checkpoint was first due that still does not exist."""
        return 0.0 if self.first_due is None else now - self.first_due

    def exhausted(self, now: float) -> bool:
        return self.waited(now) >= self.seconds
