"""Bring a ledger's schema up to date: a cheap look always, Alembic only when there is something to do."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, text

from inventory.ledger.engine import writing
from inventory.ledger.errors import LedgerError
from inventory.ledger.place import Place
from inventory.ledger.schema import HEAD, REVISIONS, VERSION_TABLE, metadata


def revision(connection: Connection, place: Place) -> str | None:
    """The schema's revision, None for a place with nothing in it.

    Raises LedgerError for a place that holds something else, or a ledger of a newer program.
    """
    if connection.dialect.name == "sqlite":
        found = set(
            connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars()
        )
    else:
        names = [*metadata.tables, VERSION_TABLE]
        query = text(
            "SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL"
        )
        found = set(connection.execute(query, {"names": names}).scalars())
    if VERSION_TABLE not in found:
        if found:
            raise LedgerError(
                f"{place} is a database of something else (with the tables {', '.join(sorted(found)[:5])}); "
                "nothing was written to it: name another place for the ledger"
            )
        return None
    current = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one()  # noqa: S608
    if current not in REVISIONS:
        raise LedgerError(
            f"the ledger {place} was written by a newer version of this program (its schema is {current}, "
            f"known here up to {HEAD}); upgrade ltpctl"
        )
    return str(current)


def upgrade(engine: Engine, place: Place, to: str = HEAD) -> None:
    """Apply the missing migrations in one transaction; of several processes one does it, the others wait."""
    with writing(engine) as connection:
        if revision(connection, place) == to:
            return
        from importlib.resources import files

        from alembic import command
        from alembic.config import Config

        config = Config()
        folder = str(files("inventory.ledger") / "migrations")
        config.set_main_option("script_location", folder.replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, to)
