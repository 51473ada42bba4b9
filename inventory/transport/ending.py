"""Cancelling a run without losing what it has read."""

from __future__ import annotations

import asyncio

from inventory.transport import Outcome

# An attribute and not a subclass: asyncio.timeout turns CancelledError itself into TimeoutError, not its kin.
_NAME = "ltpctl_outcome"


def attach(error: asyncio.CancelledError, outcome: Outcome) -> None:
    """Let the cancellation of a run carry what the command had written by then."""
    setattr(error, _NAME, outcome)


def outcome_of(error: asyncio.CancelledError) -> Outcome | None:
    """The outcome of the run that was cancelled; None if it was not a run, or had not begun."""
    outcome = getattr(error, _NAME, None)
    return outcome if isinstance(outcome, Outcome) else None
