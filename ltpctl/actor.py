"""Who is recorded as having done something."""

from __future__ import annotations

import getpass
import os


def actor() -> str:
    """``user@host``; the number of a user who has no name, as in a container."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{os.uname().nodename}"
