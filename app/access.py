"""Who is asking, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a caller may do; each role includes those before it."""

    READER = "reader"
    """See everything, change nothing."""
    SUBMITTER = "submitter"
    """Upload, submit, cancel and delete as well."""
    ADMINISTRATOR = "administrator"
    """Hand out and revoke keys as well."""

    def includes(self, other: Role) -> bool:
        """Whether whoever has this role may do what `other` may."""
        ranks = list(Role)
        return ranks.index(self) >= ranks.index(other)


@dataclass(frozen=True)
class Principal:
    """Whoever makes a call, by the id of their key, or `anonymous`."""

    name: str
    role: Role
    tenant: str
    """Whose everything is that they see and make."""


DEFAULT_TENANT = "default"
ANONYMOUS = Principal("anonymous", Role.ADMINISTRATOR, DEFAULT_TENANT)
"""Whoever calls a development service without a key."""
