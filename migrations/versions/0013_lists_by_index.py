"""lists of jobs by index, whatever they are narrowed by

PostgreSQL lets nobody write jobs while it builds the indexes, and everybody read. Jobs that an API of the version before accepts
afterwards are not found by label.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_MINE = "tenant_id = current_setting('modelpress.tenant', true)"
_NEW = {
    "ix_jobs_tenant_id_status_id": ["tenant_id", "status", "id"],
    "ix_jobs_tenant_id_model_id_id": ["tenant_id", "model_id", "id"],
}
_OLD = {"ix_jobs_tenant_id_status": ["tenant_id", "status"], "ix_jobs_model_id": ["model_id"]}


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant_id", "name", "value", "job_id", name=op.f("pk_job_labels")),
    )
    op.create_index("ix_job_labels_job_id", "job_labels", ["job_id"])
    postgresql = op.get_bind().dialect.name == "postgresql"
    each = "json_each_text" if postgresql else "json_each"
    op.execute(
        "INSERT INTO job_labels (tenant_id, name, value, job_id) "
        f"SELECT jobs.tenant_id, each.key, each.value, jobs.id FROM jobs, {each}(jobs.labels) AS each"
    )
    if postgresql:
        op.execute("ALTER TABLE job_labels ENABLE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY tenant ON job_labels TO modelpress_tenant USING ({_MINE}) WITH CHECK ({_MINE})"
        )
        op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON job_labels TO modelpress_tenant")
    _exchange(_OLD, _NEW)


def downgrade() -> None:
    _exchange(_NEW, _OLD)
    op.drop_table("job_labels")


def _exchange(old: dict[str, list[str]], new: dict[str, list[str]]) -> None:
    for name, columns in new.items():
        op.create_index(name, "jobs", columns)
    for name in old:
        op.drop_index(name, "jobs")
