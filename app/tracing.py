"""Traces by OpenTelemetry, where its environment variables ask for them; elsewhere nothing is imported for them.

A trace begins with a request, goes through the queue in the job's row (`traceparent`), and on in the worker that runs the
job. Spans leave in batches, sent by a thread that drops what it cannot send: no work waits for a collector.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from app.errors import InvalidRequest
from app.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_FLUSH_SECONDS = 2.0
"""What `stop` waits for a collector: a worker must be gone within ten seconds, its job put back."""
_PROTOCOL = "http/protobuf"


class _Process:
    """What this process sends its spans with, between `start` and `stop`."""

    provider: ClassVar[TracerProvider | None] = None


def wanted() -> bool:
    """Whether the environment asks for traces: it names a collector, or an exporter."""
    exporter = _variable("OTEL_TRACES_EXPORTER")
    if _variable("OTEL_SDK_DISABLED").lower() == "true" or exporter == "none":
        return False
    return bool(exporter or _endpoint())


def check() -> None:
    """Raise InvalidRequest where traces are wanted and cannot be had."""
    if not wanted():
        return
    exporter, protocol, endpoint = _variable("OTEL_TRACES_EXPORTER"), _protocol(), _endpoint()
    if exporter not in ("", "otlp"):
        raise _cannot(f"OTEL_TRACES_EXPORTER is {exporter}.", "Set it to otlp, or to none.")
    if protocol != _PROTOCOL:
        hint = f"Set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL={_PROTOCOL}, and the collector's port for that, often 4318."
        raise _cannot(f"Traces are sent by {_PROTOCOL} alone, not by {protocol}.", hint)
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        hint = "Set OTEL_EXPORTER_OTLP_ENDPOINT to an http:// or https:// URL."
        raise _cannot(f"The collector's URL cannot be used: {endpoint}.", hint)
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401 - before the fork, for all of a worker's pool
    except ImportError:
        hint = "pip install 'modelpress[traces]', or set OTEL_SDK_DISABLED=true."
        raise _cannot("Traces need packages that are not installed.", hint) from None


def start(part: str) -> TracerProvider | None:
    """Begin to send this process's spans, as `modelpress-<part>` where the environment names no service.

    Call it after the last fork. None: no traces are wanted. Raises InvalidRequest where they cannot be had.
    """
    check()
    if wanted() and _Process.provider is None:
        try:
            _Process.provider = _make_provider(f"modelpress-{part}")
        except ValueError as error:
            raise _cannot(f"OpenTelemetry refuses its settings: {error}", "Look at OTEL_BSP_….") from error
    return _Process.provider


def stop() -> None:
    """Send what is left, for two seconds at most, and make no more spans."""
    provider, _Process.provider = _Process.provider, None
    if provider is not None:
        # It would wait half a minute for a collector that does not answer.
        flush = threading.Thread(target=provider.shutdown, name="flush-traces", daemon=True)
        flush.start()
        flush.join(_FLUSH_SECONDS)


def tracer() -> Tracer | None:
    """What makes spans, where they are wanted."""
    return None if _Process.provider is None else _Process.provider.get_tracer("modelpress", VERSION)


def describe_request(attributes: Mapping[str, str]) -> None:
    """Put attributes, named below `modelpress.`, on the span of the request that is being answered."""
    span = _current_span()
    if span is not None:
        span.set_attributes({f"modelpress.{name}": value for name, value in attributes.items()})


def hide_query() -> None:
    """Take a request's query string out of its span: names and labels of a tenant's are in it."""
    span = _current_span()
    if span is not None:
        span.set_attribute("url.query", "REDACTED")


def current_traceparent() -> str | None:
    """The span of this request as W3C Trace Context writes it down, for whatever goes on elsewhere."""
    span = _current_span()
    if span is None:
        return None
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]


def context_of(traceparent: str | None) -> Context:
    """What a span must be started in to be a child of the one written down; of none, a context of its own."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def log_fields(span: Span | None = None) -> dict[str, str]:
    """What lines of the log carry to be found by: the trace of this span, or of this request."""
    span = span or _current_span()
    return {} if span is None else {"trace_id": f"{span.get_span_context().trace_id:032x}"}


def _current_span() -> Span | None:
    if _Process.provider is None:
        return None
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    return span if span.get_span_context().is_valid else None


def _make_provider(name: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = OTELResourceDetector().detect().attributes
    ours = {"service.name": name, "service.version": VERSION}
    resource = Resource.create({key: value for key, value in ours.items() if key not in given})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _protocol() -> str:
    given = _variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or _variable("OTEL_EXPORTER_OTLP_PROTOCOL")
    return given or _PROTOCOL


def _endpoint() -> str:
    return _variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or _variable("OTEL_EXPORTER_OTLP_ENDPOINT")


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _cannot(detail: str, hint: str) -> InvalidRequest:
    return InvalidRequest(detail, code="no_traces", hint=hint)
