"""uploads whose parts clients send to S3 themselves"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("uploads") as batch:
        batch.add_column(sa.Column("direct", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch.add_column(sa.Column("multipart_id", sa.String(), nullable=True))


def downgrade() -> None:
    # The version before would look for their bytes in staging; the bucket's lifecycle rule removes what is in S3.
    op.execute("DELETE FROM uploads WHERE direct")
    with op.batch_alter_table("uploads") as batch:
        batch.drop_column("multipart_id")
        batch.drop_column("direct")
