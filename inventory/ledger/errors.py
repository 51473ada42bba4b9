"""What can go wrong with a ledger, each in one clear line."""

from inventory.errors import UsageError


class LedgerError(UsageError):
    """The ledger cannot be opened, read or written; the message says why and what to do."""


class LedgerBusy(LedgerError):
    """Another process kept the ledger for longer than the time limit; nothing was changed."""


class StateChanged(LedgerError):
    """A node was no longer in the state that the caller expected; nothing was changed."""
