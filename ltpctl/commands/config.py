"""``ltpctl config``: which values apply, and where each came from."""

from __future__ import annotations

from ltpctl import frame
from ltpctl.exits import Exit
from ltpctl.frame import Session

app = frame.app("Show the configuration: defaults < file < environment < flags.")


@frame.command(app, "show", example="ltpctl config show\nLTP_SSH_CONCURRENCY=128 ltpctl config show --json")
def show(session: Session) -> Exit:
    """Every setting, its value, and where the value came from."""
    from ltpctl.wiring import without_password

    rows = [
        {
            "name": setting.name,
            "value": without_password(setting.value),
            "source": setting.source,
            "description": setting.description,
        }
        for setting in session.configuration.origins
    ]
    if session.out.json:
        session.out.document({"schema": "ltpctl/config/1", "settings": rows})
        return Exit.OK
    columns = ("name", "value", "source")
    session.out.table(
        columns,
        ([row["name"], _shown(row["value"]), row["source"]] for row in rows),
        wrap=frozenset({"value"}),
    )
    return Exit.OK


@frame.command(app, "path", example="$EDITOR $(ltpctl config path)")
def path(session: Session) -> Exit:
    """Where the configuration file is looked for."""
    from ltpctl.settings import chosen_file

    session.out.line(str(chosen_file(session.options.get("config"))[0]))
    return Exit.OK


@frame.command(app, "template", example="ltpctl config template > $(ltpctl config path)")
def template(session: Session) -> Exit:
    """A configuration file with every setting, its default and its meaning, all commented out."""
    import json

    from ltpctl.settings import Settings, leaves

    section = ""
    for leaf in leaves(Settings):
        head, _, key = leaf.name.rpartition(".")
        if head != section:
            session.out.line(f"#{head}:")
            section = head
        indent = "  " if head else ""
        session.out.line(f"#{indent}{key}: {json.dumps(leaf.default)}  # {leaf.description}; {leaf.variable}")
    return Exit.OK


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
