"""Run by Alembic: migrates the connection that `inventory.ledger.migrate` handed over, in its transaction."""

from alembic import context

from inventory.ledger.schema import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
