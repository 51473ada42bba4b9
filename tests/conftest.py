"""What holds for every test: captured data of others, and no skip that hides a missing part in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CAPTURES = Path(__file__).resolve().parents[2] / "shared" / "data"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.fixture(scope="session")
def captures() -> Path:
    """Real output of real tools, kept beside the project; see its README for where each came from."""
    if not CAPTURES.is_dir():
        pytest.skip("captured data of others (../shared/data) is not here")
    return CAPTURES


@pytest.fixture(autouse=True)
def _nobody_elses_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No test reads or writes the state, configuration or keys of the person who runs it."""
    home = tmp_path_factory.mktemp("home")
    # The width too: a worker of pytest-xdist has COLUMNS=80, a person's shell any other.
    terminal = ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE")
    for name in [n for n in os.environ if n.startswith(("LTP_", "XDG_", "SSH_")) or n in terminal]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NO_COLOR", "1")
    return


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not IN_CI or reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped and exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"{len(skipped)} skipped: in CI every component must be there", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
