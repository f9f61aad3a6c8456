"""Text that people send: names, labels, and what they look for. PostgreSQL keeps no NUL in a text, so nobody may send one."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

TEXT_PATTERN = r"^[^\x00]*$"
NAME_PATTERN = r"^[^\x00]*[^\s\x00][^\x00]*$"
"""A name is not all white space, since that around it is left out."""
ID_PATTERN = r"^[a-z]{3}_[0-9a-z]{1,40}$"
LABEL_FILTER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}:[^\x00]{0,255}$"

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True, pattern=NAME_PATTERN)
]
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=255, pattern=TEXT_PATTERN)]
LabelFilter = Annotated[str, StringConstraints(pattern=LABEL_FILTER_PATTERN)]
