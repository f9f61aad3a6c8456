"""whose turn it is"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_TURN = ["tenant_id", "queue", "status", "priority", "queued_at"]


def upgrade() -> None:
    _add_number("tenants", "turn", 0)
    _add_number("jobs", "priority", 1)
    op.create_index("ix_jobs_turn", "jobs", _TURN)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_index("ix_jobs_turn")
        batch.drop_column("priority")
    with op.batch_alter_table("tenants") as batch:
        batch.drop_column("turn")


def _add_number(table: str, column: str, value: int) -> None:
    """The default fills the rows that are there, and goes."""
    with op.batch_alter_table(table) as batch:
        batch.add_column(sa.Column(column, sa.BigInteger(), nullable=False, server_default=str(value)))
    with op.batch_alter_table(table) as batch:
        batch.alter_column(
            column, server_default=None, existing_type=sa.BigInteger(), existing_nullable=False
        )
