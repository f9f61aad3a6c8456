"""the ledger of workers' time

On PostgreSQL a tenant can read its part and has no right to change it. What ran before is not counted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_MINE = "tenant_id = (SELECT current_setting('modelpress.tenant', true))"


def upgrade() -> None:
    with op.batch_alter_table("tenants") as batch:
        batch.add_column(sa.Column("max_worker_seconds", sa.BigInteger(), nullable=True))
    op.create_table(
        "worker_time",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("held_until", sa.Double(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_worker_time_tenant_id")),
        sa.PrimaryKeyConstraint("job_id", "fence", name=op.f("pk_worker_time")),
    )
    op.create_index("ix_worker_time_sum", "worker_time", ["tenant_id", "held_until", "started_at"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE worker_time ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant ON worker_time TO modelpress_tenant USING ({_MINE}) WITH CHECK ({_MINE})"
        )
        op.execute("GRANT SELECT ON worker_time TO modelpress_tenant")


def downgrade() -> None:
    op.drop_table("worker_time")
    with op.batch_alter_table("tenants") as batch:
        batch.drop_column("max_worker_seconds")
