"""uploads that the service fetches from a URL"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_MINE = "tenant_id = (SELECT current_setting('modelpress.tenant', true))"


def upgrade() -> None:
    op.create_table(
        "imports",
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=True),
        sa.Column("etag", sa.String(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("running", sa.Boolean(), nullable=False),
        sa.Column("due_at", sa.Double(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["uploads.id"], name=op.f("fk_imports_upload_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_imports")),
    )
    op.create_index("ix_imports_due_at", "imports", ["due_at"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE imports ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant ON imports TO modelpress_tenant USING ({_MINE}) WITH CHECK ({_MINE})"
        )
        op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON imports TO modelpress_tenant")


def downgrade() -> None:
    # The version before knows no upload without parts; their files are removed as nobody's.
    op.execute("DELETE FROM uploads WHERE part_bytes = 0")
    op.drop_table("imports")
