"""results that are used again

Jobs that are there keep null for a key: their results are theirs alone.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_COLUMNS = ("result_key", "engine_version", "result_of")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        for column in _COLUMNS:
            batch.add_column(sa.Column(column, sa.String(), nullable=True))
    op.create_index("ix_jobs_tenant_id_result_key", "jobs", ["tenant_id", "result_key"])


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant_id_result_key", "jobs")
    with op.batch_alter_table("jobs") as batch:
        for column in reversed(_COLUMNS):
            batch.drop_column(column)
