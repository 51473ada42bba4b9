"""Where a job's time went: every second from submission to now is in exactly one bucket.

``account(entries, now)`` takes a job's journal (:mod:`~recovery.accounting.entries`) and gives an
:class:`Account`; :class:`Accountant` does the same entry by entry, for a job that still runs. What each
bucket means is said at :class:`Bucket`, how a journal is read at :class:`Accountant`. ``reliability`` says
from an account how often the job fails and how often it should save; ``summary`` puts both into lines of
text.

Everything here is a pure function of its arguments: no clock, no file, no network.
"""

from recovery.accounting.account import Account, AttemptTime, Bucket, FaultTime, LostTime, Span, document
from recovery.accounting.accountant import Accountant, account
from recovery.accounting.entries import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    Decided,
    Diagnosed,
    Diagnosing,
    Ended,
    Entry,
    FaultBegan,
    FaultDetected,
    GotNodes,
    Outcome,
    Resumed,
    RunStarted,
    Step,
    Stopped,
    Submitted,
    SupervisorAttached,
    SupervisorLost,
    Validated,
    Validating,
    WaitingForNodes,
)
from recovery.accounting.journal import Journal, from_json, read, to_json
from recovery.accounting.reliability import IntervalAdvice, Reliability, reliability
from recovery.accounting.summary import Row, Summary, summary
from recovery.accounting.trainer import from_trainer
from recovery.blame import Blame

__all__ = [
    "Account",
    "Accountant",
    "AttemptEnded",
    "AttemptStarted",
    "AttemptTime",
    "Blame",
    "Bucket",
    "CheckpointSaved",
    "Decided",
    "Diagnosed",
    "Diagnosing",
    "Ended",
    "Entry",
    "FaultBegan",
    "FaultDetected",
    "FaultTime",
    "GotNodes",
    "IntervalAdvice",
    "Journal",
    "LostTime",
    "Outcome",
    "Reliability",
    "Resumed",
    "Row",
    "RunStarted",
    "Span",
    "Step",
    "Stopped",
    "Submitted",
    "Summary",
    "SupervisorAttached",
    "SupervisorLost",
    "Validated",
    "Validating",
    "WaitingForNodes",
    "account",
    "document",
    "from_json",
    "from_trainer",
    "read",
    "reliability",
    "summary",
    "to_json",
]
