"""What a save that did not happen is told as."""

from __future__ import annotations

from dataclasses import asdict

from ltf.checkpoint.peers import Failed
from ltf.findings import Finding, Json, Severity


def skipped(version: int) -> Finding:
    message = f"step {version} is not saved: the checkpoint before it is still being written"
    return Finding("checkpoint.skipped", Severity.WARNING, version, message)


def failed(version: int, failure: Failed, reason: str) -> Finding:
    message = f"the checkpoint of step {version} was not saved: {failure}"
    evidence: dict[str, Json] = {"reason": reason, "problems": [asdict(p) for p in failure.problems]}
    ranks = tuple(sorted({problem.rank for problem in failure.problems}))
    return Finding("checkpoint.failed", Severity.ERROR, version, message, ranks, evidence)


def gave_up(version: int, waited: str, limit: float) -> Finding:
    message = (
        f"no checkpoint could be saved for {waited} since one was first due "
        f"(checkpoint.give_up_after_minutes: {limit:g}); the run stops at step {version}"
    )
    return Finding("checkpoint.gave_up", Severity.ERROR, version, message)
