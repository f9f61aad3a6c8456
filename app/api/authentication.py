"""Who is asking, found out before a byte of the body is read, and whether they may.

The one place that decides it, for every path, those that exist and those that do not: what is not listed here as open
needs a key, and what is not listed as reading needs one that may write.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app import tracing
from app.access import ANONYMOUS, Principal, Role
from app.api.problems import render
from app.api.together import Together
from app.db.engine import get_database
from app.errors import Forbidden, ModelpressError, Unauthenticated
from app.services import keys
from app.settings import Settings, get_settings, is_loopback
from app.threads import IDENTITIES, PerLoop

_OPEN = re.compile(r"/(docs|redoc|openapi\.json|favicon\.ico|static/.*|v1/health/(live|ready))?")
_ROLES = (
    (re.compile(r"\S+ /v1/(keys(/.*)?|audit)"), Role.ADMINISTRATOR),
    (re.compile(r"(GET|HEAD|OPTIONS) .*|POST /v1/plans"), Role.READER),
)


def is_open(path: str) -> bool:
    """Whether everybody may see it: the documentation, and what health checks ask."""
    return _OPEN.fullmatch(path) is not None


def required_role(method: str, path: str) -> Role:
    """The least role that may make a call."""
    # No route holds control characters, and the router's patterns end before a last newline: these must not.
    if not path.isprintable():
        return Role.ADMINISTRATOR
    call = f"{method} {path}"
    return next((role for pattern, role in _ROLES if pattern.fullmatch(call)), Role.SUBMITTER)


class Authentication:
    """Put the caller into `request.state.principal`, or answer 401 or 403."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._anonymous = settings.anonymous
        self._public_host = _authority(settings.public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wrap one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not is_open(path):
            try:
                principal = await self._caller(scope)
                _require(principal, required_role(scope["method"], path))
            except ModelpressError as error:
                # The unread body would be taken for the next request.
                headers = _challenge(error) | {"Connection": "close"}
                await render(error, headers)(scope, receive, send)
                return
            scope.setdefault("state", {})["principal"] = principal
            who = {"principal": principal.name, "tenant": principal.tenant}
            structlog.contextvars.bind_contextvars(**who)
            tracing.describe_request(who)
        await self.app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Principal:
        given = Headers(scope=scope).get("authorization")
        if given is None:
            return self._without_key(scope)
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(
                "The Authorization header holds no API key.",
                code="key_unknown",
                hint="Send `Authorization: Bearer mp_…`.",
            )
        return await _identify(token.strip())

    def _without_key(self, scope: Scope) -> Principal:
        if not self._anonymous:
            raise Unauthenticated(
                "This call needs an API key.",
                hint="Send `Authorization: Bearer mp_…`. An administrator has keys; the first one is made on the server: "
                "modelpress keys create first --role administrator.",
            )
        # Who calls over a unix socket has no address.
        host = (scope.get("client") or ("localhost",))[0]
        if re.match(r"[\d:]", host) and not is_loopback(host):
            raise Unauthenticated(
                "Without a key this service answers its own machine alone.",
                hint="Set MODELPRESS_ANONYMOUS=false and make keys with `modelpress keys create`.",
            )
        if not self._is_addressed_to_us(Headers(scope=scope)):
            raise Unauthenticated(
                "Without a key this service answers no web page of another site, and no name of the open internet.",
                hint="Call it by localhost or 127.0.0.1, set MODELPRESS_PUBLIC_URL to the URL it has, or send a key.",
            )
        return ANONYMOUS

    def _is_addressed_to_us(self, headers: Headers) -> bool:
        """Whether no page of a stranger's can be behind a call that a browser on this machine makes.

        Such a page has an origin of its own, or reaches us by a name of its own that leads here (DNS rebinding).
        """
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and _authority(origin) not in (host, self._public_host):
            return False
        name = re.sub(r":\d+$", "", host)
        is_public_name = "." in name and not re.fullmatch(r"[\d.]+|.*\.localhost|\[.*\]", name)
        return not is_public_name or host == self._public_host


async def _identify(token: str) -> Principal:
    """Whoever a bearer token stands for: an API key, or a token of the issuer in the settings."""
    if get_settings().oidc_issuer and not token.startswith(keys.PREFIX):
        return await IDENTITIES.run(_identify_by_issuer, token)
    found = await _key_lookups().ask(token)
    if isinstance(found, Principal):
        return found
    raise found or Unauthenticated("The key was not looked up.")


def _identify_by_issuer(token: str) -> Principal:
    # Cryptography is a tenth of the API's start, and most services have no issuer.
    from app.services import oidc

    return oidc.authenticate(get_database(), get_settings(), token)


def _look_up(tokens: Collection[str]) -> dict[str, Principal | ModelpressError]:
    """Whoever each key stands for, or why it stands for nobody."""
    found: dict[str, Principal | ModelpressError] = {}
    for token in tokens:
        try:
            found[token] = keys.authenticate(get_database(), get_settings(), token)
        except ModelpressError as error:
            found[token] = error
    return found


_key_lookups = PerLoop("key_lookups", lambda: Together(_look_up, IDENTITIES))


def _authority(url: str) -> str:
    """Host and port as they stand in a URL, empty where there is none."""
    return url.partition("://")[2].partition("/")[0]


def _require(principal: Principal, role: Role) -> None:
    if not principal.role.includes(role):
        raise Forbidden(
            f"This call needs the role {role}; {principal.name} is {principal.role}.",
            hint="Use another key, or ask an administrator for one.",
        )


def _challenge(error: ModelpressError) -> dict[str, str]:
    """What RFC 6750 wants beside 401 and 403."""
    if isinstance(error, Unauthenticated):
        invalid = ', error="invalid_token"' if error.code != Unauthenticated.default_code else ""
        return {"WWW-Authenticate": f'Bearer realm="modelpress"{invalid}'}
    if isinstance(error, Forbidden):
        return {"WWW-Authenticate": 'Bearer realm="modelpress", error="insufficient_scope"'}
    return {}
