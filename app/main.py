"""The HTTP service: routers, middleware, error handling, docs. Imports no torch and no worker; starts in under a second."""

# The imports come second because of what comes first.
# ruff: noqa: E402
from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# Starting makes classes and schemas, none of them garbage; a collector that looks for some takes a seventh of the time.
gc.disable()

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI
from fastapi.telemetry import TelemetryConfig

from app import tracing
from app.api import (
    artifacts,
    audit,
    catalogue,
    compress,
    datasets,
    direct_uploads,
    docs,
    health,
    imports,
    jobs,
    keys,
    metrics,
    models,
    plans,
    quota,
    uploads,
    webhooks,
)
from app.api.authentication import Authentication
from app.api.middleware import BodyLimit, RateLimit, RequestContext, is_polled
from app.api.problems import add_problem_handlers, problem_responses
from app.api.routing import refuse_unknown_query
from app.logging import configure_logging
from app.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Routes read `get_settings()`; the argument decides on limits and logs."""
    settings = settings or get_settings()
    configure_logging(settings)
    app = FastAPI(
        title="Modelpress", docs_url=None, redoc_url=None, lifespan=_lifespan, telemetry=_request_spans()
    )
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(RateLimit, settings=settings)
    app.add_middleware(Authentication, settings=settings)
    app.add_middleware(RequestContext)
    add_problem_handlers(app)
    app.include_router(_v1())
    app.include_router(metrics.router)
    docs.add_docs(app)
    return app


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await run_sync(tracing.stop)


def _request_spans() -> TelemetryConfig:
    """A span for each request, by FastAPI itself, where traces are wanted; none of its other signals."""
    provider = tracing.start("api")
    return {
        "tracing": provider is not None,
        "tracer_provider": provider,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
        "exclude": lambda scope: is_polled(scope["path"]),
    }


def _v1() -> APIRouter:
    router = APIRouter(
        prefix="/v1", responses=problem_responses(422), dependencies=[Depends(refuse_unknown_query)]
    )
    # Routes are tried in this order: what is asked the most comes first.
    for module in (
        jobs,
        uploads,
        direct_uploads,
        imports,
        models,
        datasets,
        compress,
        artifacts,
        catalogue,
        plans,
        keys,
        audit,
        quota,
        webhooks,
        health,
    ):
        router.include_router(module.router)
    return router


app = create_app()

gc.enable()
