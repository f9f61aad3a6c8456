"""retention

Up: what is there stays until somebody sets a retention. Down: files that expired are listed again, and have no bytes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_DAYS = ("artifact_retention_days", "audit_retention_days")


def upgrade() -> None:
    with op.batch_alter_table("tenants") as batch:
        for column in _DAYS:
            batch.add_column(sa.Column(column, sa.BigInteger(), nullable=True))
    with op.batch_alter_table("artifacts") as batch:
        batch.add_column(sa.Column("expired_at", sa.Double(), nullable=True))
    # Begins with the tenant, as the one it takes the place of.
    op.create_index("ix_artifacts_expiry", "artifacts", ["tenant_id", "kind", "expired_at", "created_at"])
    op.drop_index("ix_artifacts_tenant_id", "artifacts")


def downgrade() -> None:
    op.create_index("ix_artifacts_tenant_id", "artifacts", ["tenant_id"])
    op.drop_index("ix_artifacts_expiry", "artifacts")
    with op.batch_alter_table("artifacts") as batch:
        batch.drop_column("expired_at")
    with op.batch_alter_table("tenants") as batch:
        for column in reversed(_DAYS):
            batch.drop_column(column)
