"""Work that is done over and over for as long as a process lives."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from app.errors import ModelpressError

_log = structlog.get_logger(__name__)


def forever(work: Callable[[], None], stop: threading.Event, *, name: str, every_seconds: float) -> None:
    """Do `work`, wait, and do it again, until told to stop. Others depend on that: whatever it raises is logged, and met
    again next time."""
    while not stop.is_set():
        try:
            work()
        except ModelpressError as error:
            _log.warning(f"{name}_failed", code=error.code, error=error.detail)
        except Exception:  # noqa: BLE001 - logged with its trace
            _log.exception(f"{name}_failed")
        stop.wait(every_seconds)
