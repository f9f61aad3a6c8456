"""Bring the database to the newest version, from inside the package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations


def migrate() -> None:
    """Run every migration that is missing on the database the settings name. Safe to repeat."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    command.upgrade(config, "head")
