"""The spans of one attempt at a job: one for all of it, and one for each of its parts, which follow each other.

The supervisor makes them. The job's process has no network, and does not know of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from app import tracing
from app.db.job_claims import Claim

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class AttemptSpans:
    """A block is the attempt; in it parts begin and end. Where no traces are wanted, all of it does nothing."""

    def __init__(self, claim: Claim, *, worker: str) -> None:
        self._tracer = tracing.tracer()
        self._attempt: Span | None = None
        self._part: Span | None = None
        if self._tracer is not None:
            from opentelemetry.trace import SpanKind

            self._attempt = self._tracer.start_span(
                "job attempt", context=tracing.context_of(claim.traceparent), kind=SpanKind.CONSUMER
            )
        self.describe({"job.id": claim.job_id, "job.attempt": claim.attempt, "worker": worker})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self.end_part()
        if self._attempt is not None:
            self._attempt.end()

    def log_fields(self) -> dict[str, str]:
        """What lines of the log carry to be found by."""
        return tracing.log_fields(self._attempt)

    def describe(self, attributes: Mapping[str, str | int | float]) -> None:
        """Put attributes on the attempt, named below `modelpress.`."""
        if self._attempt is not None:
            self._attempt.set_attributes({f"modelpress.{name}": value for name, value in attributes.items()})

    def begin_part(self, name: str) -> None:
        """Begin a part, where the one before ends at the latest."""
        self.end_part()
        if self._tracer is not None and self._attempt is not None:
            from opentelemetry.trace import set_span_in_context

            self._part = self._tracer.start_span(name, context=set_span_in_context(self._attempt))

    def end_part(self) -> None:
        """End the part that is under way."""
        if self._part is not None:
            self._part.end()
            self._part = None

    def fail(self, code: str) -> None:
        """Say that the attempt failed in the part under way. The code alone: details may quote a tenant's files."""
        for span in (self._part, self._attempt):
            if span is not None:
                from opentelemetry.trace import StatusCode

                span.set_attribute("error.type", code)
                span.set_status(StatusCode.ERROR, code)
