"""audit log

On PostgreSQL a tenant can add to it and read it, and has no right to change or delete what is there.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_MINE = "tenant_id = (SELECT current_setting('modelpress.tenant', true))"


def upgrade() -> None:
    op.create_table(
        "audit_entries",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("principal", sa.String(), nullable=False),
        sa.Column("call", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_audit_entries_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entries")),
    )
    op.create_index("ix_audit_entries_tenant_id_id", "audit_entries", ["tenant_id", "id"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE audit_entries ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant ON audit_entries TO modelpress_tenant USING ({_MINE}) WITH CHECK ({_MINE})"
        )
        op.execute("GRANT SELECT, INSERT ON audit_entries TO modelpress_tenant")


def downgrade() -> None:
    op.drop_table("audit_entries")
