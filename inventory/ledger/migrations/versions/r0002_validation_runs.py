"""Validation runs, their verdicts, and the numbers that baselines are learned from."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("started", sa.Double, nullable=False),
        sa.Column("finished", sa.Double),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("selection", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
    )
    op.create_index("runs_by_start", "runs", ["kind", "started"])
    op.create_table(
        "verdicts",
        sa.Column("id", key, primary_key=True, autoincrement=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("sku", sa.Text),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("findings", sa.Text, nullable=False),
        sa.Column("checks", sa.Text, nullable=False),
        sa.UniqueConstraint("run", "node", name="verdicts_once_a_run"),
        sqlite_autoincrement=True,
    )
    op.create_index("verdicts_by_node", "verdicts", ["node", "id"])
    op.create_index("verdicts_by_time", "verdicts", ["time"])
    op.create_table(
        "metrics",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
    )
    op.create_table(
        "measurements",
        sa.Column("metric", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("verdict", key, primary_key=True, autoincrement=False),
        sa.Column("device", sa.Text, primary_key=True),
        sa.Column("repeat", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.Double, nullable=False),
        sqlite_with_rowid=False,
    )
