"""quotas of tenants"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("tenants") as batch:
        batch.add_column(sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True))
        batch.add_column(sa.Column("max_queued_jobs", sa.BigInteger(), nullable=True))
    op.create_index("ix_artifacts_tenant_id", "artifacts", ["tenant_id"])
    op.create_index("ix_jobs_tenant_id_status", "jobs", ["tenant_id", "status"])


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant_id_status", "jobs")
    op.drop_index("ix_artifacts_tenant_id", "artifacts")
    with op.batch_alter_table("tenants") as batch:
        batch.drop_column("max_queued_jobs")
        batch.drop_column("max_stored_bytes")
