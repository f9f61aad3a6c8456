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
    """Whoever makes a call: the id of a key, or `anonymous`."""

    name: str
    role: Role


ANONYMOUS = Principal("anonymous", Role.ADMINISTRATOR)
"""Whoever calls a development service without a key."""
