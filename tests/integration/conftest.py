"""The program as its users run it: ``ltpctl`` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sshd import ssh_keys, start_sshd

LTPCTL = (sys.executable, "-c", "from ltpctl.cli import main; main()")

Run = Callable[..., subprocess.CompletedProcess[str]]

__all__ = ["ltpctl", "ssh_keys", "start_sshd"]


@pytest.fixture
def ltpctl(tmp_path: Path) -> Run:
    """``ltpctl("validate", "nodes", LTP_X="...")``; state lies in the test's own folder."""

    def run(*arguments: str, timeout: float = 90, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LTPCTL, *arguments],
            capture_output=True,
            check=False,
            text=True,
            timeout=timeout,
            env={**os.environ, "LTP_STATE_DIR": str(tmp_path / "state"), **environment},
        )

    return run
