"""How SSH is to be spoken: what a person configures, free of any SSH library."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from inventory.transport import Retry

Address = tuple[int, tuple[str, int]]
"""An address family of `socket` and what to connect to."""

Resolver = Callable[[str, int], Awaitable[Sequence[Address]]]
"""From a host's name and port to its addresses, in order of preference. Raises OSError."""


@dataclass(frozen=True, slots=True)
class SshSettings:
    """Everything that holds for all nodes. A node's attributes come first, then these, then ssh_config."""

    known_hosts: tuple[str, ...] = ()
    """Files of host keys; the first is where `accept_new` writes. Empty: what ssh_config says, else
    ``~/.ssh/known_hosts`` and ``/etc/ssh/ssh_known_hosts``."""
    accept_new: bool = False
    """Learn the key of a host that has none yet. A *changed* key is refused whatever this says."""
    config_files: tuple[str, ...] | None = None
    """ssh_config files, first match wins. None: ``~/.ssh/config`` and ``/etc/ssh/ssh_config``; (): none."""
    user: str | None = None
    identities: tuple[str, ...] = ()
    """Private keys to offer; empty: ssh_config's, else the usual ``~/.ssh/id_*``. Encrypted ones need the
    agent."""
    agent: bool = True
    retry: Retry = field(default_factory=Retry)
    keepalive: float = 15.0
    """Seconds of silence after which a node is asked whether it is still there; three unanswered: lost."""
    rng: random.Random = field(default_factory=random.Random)
    """For the jitter of retries."""
    clock: Callable[[], float] = time.time
    resolver: Resolver | None = None
    """None: the system's."""
    jump_memory: float = 30.0
    """Seconds for which a jump host that could not be reached is not tried again."""
