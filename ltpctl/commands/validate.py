"""``ltpctl validate``: which nodes may be given to a job, and why not the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ltpctl import frame
from ltpctl.exits import Exit
from ltpctl.frame import Session

if TYPE_CHECKING:
    from probes.catalogue import Level
    from probes.plan import Plan

app = frame.app("Check nodes and say which may be given to a job, and why not the others.")

Only = Annotated[
    list[str] | None,
    typer.Option(
        "--check", "-c", metavar="NAME", help="only these checks: name, family, tag or glob; repeatable"
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", "-s", metavar="NAME", help="not these checks; repeatable")
]
Quick = Annotated[bool, typer.Option("--quick", help="seconds; puts no load on the machine")]
Standard = Annotated[
    bool, typer.Option("--standard", help="about a minute; measures compute, memory and disks")
]
Comprehensive = Annotated[
    bool, typer.Option("--comprehensive", help="minutes; everything, counters watched under load")
]


@frame.command(
    app,
    "nodes",
    selection=True,
    example="""
    ltpctl validate nodes --quick
    ltpctl validate nodes --nodes 'rack1,node[200-210]' --standard --apply --html report.html
    ltpctl validate nodes --check accelerator --skip accelerator.clocks --json
    """,
)
def nodes(
    session: Session,
    quick: Quick = False,
    standard: Standard = False,
    comprehensive: Comprehensive = False,
    check: Only = None,
    skip: Skip = None,
    apply: Annotated[
        bool,
        typer.Option("--apply", help="move nodes in the ledger as their verdicts say (available, cordoned)"),
    ] = False,
    load_in_use: Annotated[
        bool,
        typer.Option("--load-in-use", help="run loading checks even where a job or somebody's processes are"),
    ] = False,
    junit: Annotated[str | None, typer.Option("--junit", metavar="FILE", help="write JUnit XML")] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="write a self-contained page")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, max=4096, help="nodes at once")
    ] = None,
    accept_new: Annotated[
        bool,
        typer.Option("--accept-new", help="trust host keys never seen before (changed ones stay refused)"),
    ] = False,
    no_ledger: Annotated[
        bool,
        typer.Option("--no-ledger", help="neither read nor write the ledger: no history, baselines, states"),
    ] = False,
) -> Exit:
    """Run checks on the nodes and print a verdict for each: healthy, degraded, unhealthy or unknown.

    Exit status 1 if any node is not healthy, 3 if not one node could be judged.
    """
    from inventory.errors import UsageError

    if apply and no_ledger:
        raise UsageError("--apply moves nodes in the ledger; it cannot go with --no-ledger")
    from ltpctl.validation import Request, run

    level = _level(quick, standard, comprehensive) or session.configuration.settings.validate_.plan
    request = Request(
        level=level,
        only=tuple(check or ()),
        skip=tuple(skip or ()),
        apply=apply,
        load_in_use=load_in_use,
        concurrency=concurrency or session.configuration.settings.ssh.concurrency,
        accept_new=accept_new,
        ledger=not no_ledger,
        files={"--junit": junit, "--html": html},
    )
    return run(session, request)


@frame.command(
    app,
    "diff",
    selection=True,
    example="ltpctl validate diff\nltpctl validate diff --run 20260102T0304 --json",
)
def diff(
    session: Session,
    run: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="a run, or how its id begins; default: the last")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="ID", help="an earlier run; default: the one before")
    ] = None,
) -> Exit:
    """What changed between two validations: nodes that became bad, recovered, or changed their findings.

    Exit status 1 if a node became worse.
    """
    from ltpctl.validation import difference

    return difference(session, run, against)


@frame.command(app, "runs", example="ltpctl validate runs\nltpctl validate runs --limit 3 --json")
def runs(
    session: Session, limit: Annotated[int, typer.Option("--limit", min=1, help="newest so many")] = 20
) -> Exit:
    """The validations that the ledger holds, newest first."""
    from ltpctl.times import shown

    with session.ledger(read_only=True) as ledger:
        found = ledger.runs("validate", limit)
    if session.out.json:
        session.out.document({"schema": "ltpctl/runs/1", "runs": [vars_of(run) for run in found]})
        return Exit.OK
    session.out.table(
        ("run", "started", "plan", "nodes", "result"),
        (
            (
                r.id,
                shown(r.started),
                r.plan,
                r.selection,
                _summary(dict(r.summary)) if r.finished else "not finished",
            )
            for r in found
        ),
        wrap=frozenset({"nodes"}),
    )
    return Exit.OK


@frame.command(
    app, "list", example="ltpctl validate list --quick\nltpctl validate list --check network --json"
)
def list_checks(
    session: Session,
    quick: Quick = False,
    standard: Standard = False,
    comprehensive: Comprehensive = False,
    check: Only = None,
    skip: Skip = None,
) -> Exit:
    """The checks of a plan; all of them without an option."""
    plan = _plan(session, _level(quick, standard, comprehensive) or "comprehensive", check, skip)
    if session.out.json:
        rows = [
            {
                "check": c.name,
                "what": c.spec.what.strip(),
                "level": c.spec.level,
                "loads": c.spec.loads,
                "essential": c.spec.essential,
                "needs": c.spec.needs or None,
                "tags": list(c.spec.tags),
                "timeout": c.spec.timeout,
                "origin": None if c.built_in else c.origin,
            }
            for c in plan.checks
        ]
        session.out.document({"schema": "ltpctl/checks-list/1", "checks": rows})
        return Exit.OK
    session.out.table(
        ("check", "plan", "load", "what"),
        (
            (c.name, c.spec.level, "loads" if c.spec.loads else "", " ".join(c.spec.what.split()))
            for c in plan.checks
        ),
        wrap=frozenset({"what"}),
    )
    return Exit.OK


@frame.command(
    app,
    "explain",
    example="ltpctl validate explain accelerator.ecc\nltpctl validate explain compute.gemm --json",
)
def explain(
    session: Session,
    check: Annotated[str, typer.Argument(metavar="CHECK", help="name of a check, as in a finding")],
) -> Exit:
    """What a check looks at, why it matters, its limits on each SKU with their sources, and what to do."""
    from ltpctl.reports.explanation import show_explanation
    from ltpctl.validation import catalogue, rule_book
    from probes.explain import explain as look_up

    checks = catalogue(session)
    show_explanation(session.out, look_up(check, checks, rule_book(session, checks).profiles))
    return Exit.OK


def _level(quick: bool, standard: bool, comprehensive: bool) -> Level | None:
    from inventory.errors import UsageError

    levels: dict[Level, bool] = {"quick": quick, "standard": standard, "comprehensive": comprehensive}
    chosen = [level for level, wanted in levels.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"give one of --{' and --'.join(chosen)}: each plan contains the smaller ones")
    return chosen[0] if chosen else None


def _plan(session: Session, level: Level, only: list[str] | None, skip: list[str] | None) -> Plan:
    from ltpctl.validation import catalogue
    from probes.plan import make_plan

    return make_plan(catalogue(session), level, only or (), skip or ())


def _summary(counts: dict[str, object]) -> str:
    return ", ".join(
        f"{n} {word}"
        for word, n in counts.items()
        if n and word in ("healthy", "degraded", "unhealthy", "unknown")
    )


def vars_of(value: object) -> dict[str, object]:
    import dataclasses

    return dataclasses.asdict(value)  # type: ignore[call-overload, no-any-return]
