"""What the exit status of every command means."""

import enum


class Exit(enum.IntEnum):
    OK = 0
    """Done, and nothing was found that needs a person."""
    FINDINGS = 1
    """The command worked; it found something: an unhealthy node, a failed job, new findings of a sweep."""
    USAGE = 2
    """Wrong options, a wrong file, a wrong configuration. Nothing was changed."""
    UNDETERMINED = 3
    """It could not be found out: not one node could be judged, or there is nothing yet to compare."""
    DEFECT = 70
    """ltpctl itself broke, with a traceback (EX_SOFTWARE). Python's own status would read as findings."""
    LOCKED = 75
    """Skipped: another run holds the lock, or the ledger stayed busy. Try again later (EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Ended by Ctrl-C or SIGTERM; what was known by then was printed."""
