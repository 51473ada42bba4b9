"""Write ``docs/reference/``: commands, settings, checks and SKU profiles; from code and data.

``make docs`` runs it; a test fails when what is written is not what it would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).with_name("reference")
HEAD = "<!-- Written by docs/generate.py from code and data; change those, then run `make docs`. -->\n\n"


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    return {
        "commands.md": commands(),
        "configuration.md": configuration(),
        "checks.md": checks(),
        "profiles.md": profiles(),
        "ltf-configuration.md": training(),
    }


def commands() -> str:
    import typer

    from ltpctl.cli import app

    root = typer.main.get_command(app)
    text = HEAD + "# Commands\n\n"
    for path, command in _walk(root, ("ltpctl",)):
        context = typer.Context(command, info_name=" ".join(path), max_content_width=100, terminal_width=100)
        shown = command.get_help(context).replace(str(Path.home()), "~")
        text += f"## {' '.join(path)}\n\n```\n{_trimmed(shown)}\n```\n\n"
    return text.rstrip() + "\n"


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*path, name))


def configuration() -> str:
    from ltpctl.settings import Settings, leaves

    text = (
        HEAD
        + "# Configuration\n\nDefaults < file < environment < flags; "
        + "`ltpctl config show` says where each value came from.\n\n"
    )
    text += "| setting | default | environment | meaning |\n|---|---|---|---|\n"
    for leaf in leaves(Settings):
        default = leaf.default
        if isinstance(default, tuple):
            default = ", ".join(default)
        shown = str(default).replace(str(Path.home()), "~") if default not in (None, "") else "-"
        text += f"| `{leaf.name}` | {_cell(shown)} | `{leaf.variable}` | {_cell(leaf.description)} |\n"
    return text


def checks() -> str:
    from probes.catalogue import load_catalogue

    catalogue = load_catalogue()
    text = (
        HEAD
        + f"# Checks\n\n{len(catalogue)} checks. Plans contain each other: quick ⊂ standard ⊂ comprehensive. "
    )
    text += "Limits here are the defaults; [SKU profiles](profiles.md) replace them.\n"
    family = ""
    for check in catalogue:
        if check.family != family:
            family = check.family
            text += f"\n## {family}\n"
        spec = check.spec
        marks = [f"plan **{spec.level}**", f"limit {spec.timeout:g} s"]
        marks += ["**loads the machine**"] if spec.loads else []
        marks += ["**essential**"] if spec.essential else []
        marks += [f"only with {spec.needs}"] if spec.needs else []
        marks += [f"tags {', '.join(spec.tags)}"] if spec.tags else []
        text += f"\n### {check.name}\n\n{spec.what.strip()}\n\n{' · '.join(marks)}\n\n"
        text += f"- Why: {spec.why.strip()}\n- Fix: {spec.fix.strip()}\n\n"
        text += "| metric | unit | fails unless | warns unless | peers | baseline | what |\n"
        text += "|---|---|---|---|---|---|---|\n"
        for name, metric in spec.metrics.items():
            limit = metric.limit
            peers = metric.peers
            cells = (
                f"`{name}`",
                metric.unit,
                (limit.fail if limit else None) or "",
                (limit.warn if limit else None) or "",
                f"{peers.rule} ({peers.outcome})" if peers else "",
                f"{metric.baseline.worse} is worse" if metric.baseline else "",
                metric.what,
            )
            text += "| " + " | ".join(_cell(c) for c in cells) + " |\n"
    return text


def profiles() -> str:
    from probes.catalogue import load_catalogue
    from probes.profiles import load_profiles

    text = (
        HEAD
        + "# SKU profiles\n\n"
        + "What nodes of one kind must show, over the defaults of the [checks](checks.md).\n"
    )
    for profile in load_profiles(load_catalogue()).by_name.values():
        text += f"\n## {profile.name}\n\n{profile.what.strip()}\n\n"
        facts = [f"{profile.accelerators} accelerators" if profile.accelerators else "no accelerators"]
        facts += (
            [f"recognised by PCI {', '.join(f'`{p}`' for p in sorted(profile.pci))}"] if profile.pci else []
        )
        facts += [f"also called {', '.join(profile.aliases)}"] if profile.aliases else []
        text += " · ".join(facts) + "\n\n"
        text += "| metric | fails unless | warns unless | where the limit comes from |\n|---|---|---|---|\n"
        for name, demand in profile.demands.items():
            cells = (f"`{name}`", str(demand.fail or ""), str(demand.warn or ""), demand.reference)
            text += "| " + " | ".join(_cell(c) for c in cells) + " |\n"
    return text


def training() -> str:
    from ltf.config.reference import markdown

    return HEAD + markdown()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


if __name__ == "__main__":
    sys.path.insert(0, str(REFERENCE.parents[1]))
    REFERENCE.mkdir(exist_ok=True)
    for name, content in pages().items():
        (REFERENCE / name).write_text(content)
