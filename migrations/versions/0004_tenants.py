"""tenants

Up: what is there becomes the tenant `default`'s, and stays it. On PostgreSQL the role `modelpress_tenant`, which nobody
can log in as, is held to row-level security; the service takes it on for every transaction of a tenant. Making it needs
CREATEROLE; a login without it finds the role made beforehand:

    CREATE ROLE modelpress_tenant NOLOGIN; GRANT modelpress_tenant TO <the service's login>;

Down: nothing is lost, and everything is everybody's again; so the keys of other tenants go. The role stays: other
databases of the server may use it.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROLE = "modelpress_tenant"
OWNED = ("uploads", "models", "datasets", "jobs", "api_keys")
BELOW = ("upload_parts", "model_files", "job_stages", "job_events", "artifacts")
_TENANTS = sa.table("tenants", sa.column("id"), sa.column("created_at"))

_MAKE_ROLE = f"""
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{ROLE}') THEN
    CREATE ROLE {ROLE} NOLOGIN;
  END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$
"""
# A superuser may become any role. One who may not grant it was granted it when it was made.
_MAY_BECOME = f"""
DO $$ BEGIN
  IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
    EXECUTE format('GRANT {ROLE} TO %I', current_user);
  END IF;
EXCEPTION WHEN insufficient_privilege THEN NULL;
END $$
"""


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.execute(_TENANTS.insert().values(id="default", created_at=time.time()))
    for table in (*OWNED, *BELOW, "idempotency_keys"):
        _add_tenant(table)
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.drop_constraint("pk_idempotency_keys", type_="primary")
        batch.create_primary_key("pk_idempotency_keys", ["tenant_id", "key"])
    if _is_postgresql():
        _divide()


def downgrade() -> None:
    op.execute("DELETE FROM api_keys WHERE tenant_id <> 'default'")
    op.execute("DELETE FROM idempotency_keys WHERE tenant_id <> 'default'")
    if _is_postgresql():
        _unite()
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.drop_constraint("pk_idempotency_keys", type_="primary")
        batch.create_primary_key("pk_idempotency_keys", ["key"])
    for table in (*OWNED, *BELOW, "idempotency_keys"):
        with op.batch_alter_table(table) as batch:
            if table in OWNED:
                batch.drop_index(f"ix_{table}_tenant_id_id")
                batch.drop_constraint(f"fk_{table}_tenant_id", type_="foreignkey")
            batch.drop_column("tenant_id")
    op.drop_table("tenants")


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _add_tenant(table: str) -> None:
    """The default fills the rows that are there (PostgreSQL rewrites none for it) and goes: later ones name their tenant."""
    with op.batch_alter_table(table) as batch:
        batch.add_column(sa.Column("tenant_id", sa.String(), nullable=False, server_default="default"))
    with op.batch_alter_table(table) as batch:
        batch.alter_column(
            "tenant_id", server_default=None, existing_type=sa.String(), existing_nullable=False
        )
        if table in OWNED:
            batch.create_foreign_key(op.f(f"fk_{table}_tenant_id"), "tenants", ["tenant_id"], ["id"])
            batch.create_index(f"ix_{table}_tenant_id_id", ["tenant_id", "id"])


def _divide() -> None:
    op.execute(_MAKE_ROLE)
    op.execute(_MAY_BECOME)
    for table in ("tenants", *OWNED, *BELOW, "idempotency_keys"):
        own = "id" if table == "tenants" else "tenant_id"
        # As a sub-select it is evaluated once for a statement and not for each row.
        mine = f"{own} = (SELECT current_setting('modelpress.tenant', true))"
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} TO {ROLE} USING ({mine}) WITH CHECK ({mine})")
        # To lock its row a tenant needs a right to change it; of its id the policy leaves nothing to change.
        rights = "SELECT, UPDATE (id)" if table == "tenants" else "SELECT, INSERT, UPDATE, DELETE"
        op.execute(f"GRANT {rights} ON {table} TO {ROLE}")
    op.execute(f"GRANT SELECT ON workers TO {ROLE}")


def _unite() -> None:
    for table in ("tenants", *OWNED, *BELOW, "idempotency_keys"):
        op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
        op.execute(f"REVOKE ALL ON {table} FROM {ROLE}")
    op.execute(f"REVOKE ALL ON workers FROM {ROLE}")
