"""One node's report against the rules of its kind: an outcome for every check, and the findings. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from probes.criteria import judge
from probes.limits import Demand, parse
from probes.model import Finding, NodeReport, Outcome, Status
from probes.profiles import Kind

CLOCK_CHECK, CLOCK_METRIC = "host.clock", "controller_offset"

CLOCK = Demand(
    parse("between -5 and 5"),
    parse("between -1 and 1"),
    "default",
    "certificates, Kerberos (5 min), logs of several nodes and leases need clocks that agree",
)
"""Seconds, node minus controller, when the inventory or the catalogue says nothing else about host.clock."""

KIND_CHECK = "fleet.sku"
LEFTOVER_CHECK = "agent.leftover"


@dataclass(frozen=True, slots=True)
class Judgement:
    outcomes: Mapping[str, Outcome]
    """Every check that was asked about."""
    findings: tuple[Finding, ...]


def judge_report(
    report: NodeReport,
    kind: Kind,
    checks: Iterable[str],
    left_out: Mapping[str, str] | None = None,
) -> Judgement:
    """What `report` says about its node by absolute limits alone.

    `left_out`: checks that the node was not asked, and why; they are shown and do not count. What the
    node did not answer because it failed as a whole is unknown, and told once.
    """
    outcomes: dict[str, Outcome] = {}
    findings: list[Finding] = []
    unanswered = 0
    for check in checks:
        if left_out and (reason := left_out.get(check)):
            outcomes[check] = Outcome.NOT_APPLICABLE
            findings.append(Finding(check, Outcome.NOT_APPLICABLE, f"not run: {reason}"))
            continue
        record = report.records.get(check)
        if report.failure and (record is None or record.status is Status.MISSING):
            outcomes[check] = Outcome.UNKNOWN
            unanswered += 1
            continue
        judged = judge(kind.rules, check, record)
        outcomes[check] = judged.outcome
        findings += judged.findings
    if report.failure:
        findings.append(_failure(report, unanswered, len(outcomes)))
    return Judgement(outcomes, tuple(findings))


def _failure(report: NodeReport, unanswered: int, asked: int) -> Finding:
    timeout = report.failure_ending == "timeout"
    return Finding(
        check=report.failure_phase if "." in report.failure_phase else f"transport.{report.failure_phase}",
        outcome=Outcome.TIMEOUT if timeout else Outcome.UNKNOWN,
        message=report.failure,
        value=unanswered,
        unit="checks",
        limit="== 0",
        source="default",
        reference=f"{unanswered} of {asked} checks without an answer",
        action=report.failure_action,
    )


def judge_ending(clean: bool) -> list[Finding]:
    """What it says about a node that a process of the checks could not be killed there."""
    if clean:
        return []
    return [
        Finding(
            LEFTOVER_CHECK,
            Outcome.WARN,
            "a process that a check started outlived SIGKILL: it is stuck in the kernel",
            value=False,
            limit="== true",
            source="default",
            reference="only a process in an uninterruptible wait survives SIGKILL (proc(5), state D)",
            action="See ps -eo pid,stat,wchan:32,args for state D: a driver or file system hangs. Reboot it.",
        )
    ]


def judge_clock(offset: float) -> list[Finding]:
    """The finding that a node's clock is off by `offset` seconds (positive: ahead), if that is too much."""
    side = "ahead of" if offset > 0 else "behind"
    for outcome, limit in ((Outcome.FAIL, CLOCK.fail), (Outcome.WARN, CLOCK.warn)):
        if limit is not None and limit.holds(offset) is not True:
            return [
                Finding(
                    check=CLOCK_CHECK,
                    outcome=outcome,
                    message=f"its clock is {abs(offset):.1f} s {side} this machine's",
                    metric=CLOCK_METRIC,
                    value=round(offset, 3),
                    unit="seconds",
                    limit=limit.text,
                    source=CLOCK.source,
                    reference=CLOCK.reference,
                    action="Let chrony or ntpd run on the node; see whether this machine's clock is right.",
                )
            ]
    return []


def judge_kind(kind: Kind) -> list[Finding]:
    """The finding that nobody has said what a node with such accelerators must show."""
    if kind.recognised:
        return []
    message = f"accelerators of no known SKU ({kind.sku}): only the catalogue's own limits were applied"
    action = (
        "Name its SKU in the inventory, or write a profile; 'sku: generic-accelerator' accepts the defaults."
    )
    return [Finding(KIND_CHECK, Outcome.WARN, message, value=kind.sku, action=action)]
