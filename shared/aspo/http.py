"""The HTTP shell of both services: scopes, probes, metrics and one error shape.

    app = create_app("learner", auth=settings.auth, ready=is_ready, registry=REGISTRY)

    @app.get("/v1/status", dependencies=[require(Scope.READER)])
    def status() -> Status: ...

    with bind(settings.learner, settings.auth).serve(app) as server:    # uvicorn in a thread of its own
        print(server.url)

Probes and metrics are public; every other route names a scope. Without tokens only loopback addresses are
served. With a `probe_port` the probes are served on a port of their own as well, in a thread that no other
request can hold up.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import hmac
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from aspo.config import AuthConfig, HttpConfig
from aspo.errors import AspoError
from aspo.limits import MAX_BODY, BoundedProtocol, Limits, Pace
from aspo.tls import server_context

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_LIMITS = Limits()
_PUBLIC: dict[str, Any] = {"security": []}
_BEARER = {"type": "http", "scheme": "bearer", "description": "A token of the route's scope"}


class ServeError(AspoError, RuntimeError):
    """The service cannot listen as configured; the text says what to do."""


class Scope(enum.Enum):
    """Who may call a route; an operator may call all of them, an actor also reads.

    A blob is also given for a ticket, which opens that blob alone.
    """

    BLOB = "blob"
    READER = "reader"
    ACTOR = "actor"
    OPERATOR = "operator"


_GRANTED = {
    Scope.BLOB: (Scope.ACTOR, Scope.OPERATOR),
    Scope.READER: (Scope.READER, Scope.ACTOR, Scope.OPERATOR),
    Scope.ACTOR: (Scope.ACTOR, Scope.OPERATOR),
    Scope.OPERATOR: (Scope.OPERATOR,),
}


class ErrorDetail(BaseModel):
    """What went wrong and what to do."""

    code: str
    message: str
    hint: str = ""


class ErrorBody(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error answer with a code, a message and a hint."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(status, message)
        self.code, self.hint = code, hint


def create_app(
    name: str, *, auth: AuthConfig, ready: Callable[[], str | None], registry: CollectorRegistry
) -> FastAPI:
    """Make the FastAPI app with probes, `/metrics` and error answers; `ready` returns why not, or None."""
    app = FastAPI(
        title=f"ASPO {name}",
        version="1",
        responses={"default": {"model": ErrorBody}},
        openapi_url=None,  # its routes and its pages are public; `_describe` adds one that is not
    )
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
    app.add_middleware(_DeclaredBodyLimit)  # runs first
    app.state.auth = auth
    app.state.closing = asyncio.Event()  # set when the server is told to stop: long-polls answer then
    app.state.refusals = Pace(rate=50, wait_s=1.0)
    app.state.probes = FastAPI(openapi_url=None)  # for a port of their own
    app.state.probes.state.closing = asyncio.Event()
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(Exception, _on_fault)
    _describe(app)
    app.include_router(_probe_routes(ready, registry))
    app.state.probes.include_router(_probe_routes(ready, registry))
    return app


def _describe(app: FastAPI) -> None:
    """Add the OpenAPI document and its page, for readers."""
    described = app.openapi
    reader = [require(Scope.READER)]

    def openapi() -> dict[str, Any]:
        schema = described()
        schema.setdefault("components", {})["securitySchemes"] = {"token": _BEARER}
        return schema | {"security": [{"token": []}]}

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/openapi.json", dependencies=reader, include_in_schema=False)
    def document() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", dependencies=reader, include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="openapi.json", title=app.title)


def _probe_routes(ready: Callable[[], str | None], registry: CollectorRegistry) -> APIRouter:
    """Make the routes that anybody may call, paced among themselves."""
    pace = Pace(rate=100, wait_s=0.5)
    router = APIRouter(tags=["probes"], dependencies=[Depends(pace.turn)])

    @router.get("/livez", response_class=PlainTextResponse, openapi_extra=_PUBLIC)
    async def livez() -> str:
        """Say that the process answers."""
        return "ok"

    @router.get("/readyz", response_class=PlainTextResponse, openapi_extra=_PUBLIC)
    def readyz() -> Response:
        """Say whether the service can do its work now, and if not why."""
        reason = ready()
        return PlainTextResponse(reason or "ok", status_code=503 if reason else 200)

    @router.get("/metrics", response_class=PlainTextResponse, openapi_extra=_PUBLIC)
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router


def require(scope: Scope) -> Any:
    """Make the dependency that lets a request in only with a token of the scope."""

    # A coroutine without parameters of its own: a function would go through a thread, and parameters through
    # FastAPI's resolver, for each of a thousand actors' requests.
    async def check(request: Request) -> None:
        auth: AuthConfig = request.app.state.auth
        tokens = auth.tokens
        if not tokens:
            _require_local(request)  # `listen` has made sure that only loopback addresses are served
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        accepted = [tokens[s.value] for s in _GRANTED[scope] if s.value in tokens]
        if scope is Scope.BLOB:
            accepted += [blob_ticket(token, request.path_params["digest"]) for token in accepted]
        if not given or not any(hmac.compare_digest(given.encode(), token.encode()) for token in accepted):
            status, code = (403, "forbidden") if given else (401, "unauthorized")
            needed = "an actor" if scope in (Scope.ACTOR, Scope.BLOB) else f"a {scope.value}"
            needed = "an operator" if scope is Scope.OPERATOR else needed
            raise ApiError(
                status, code, f"this route needs {needed} token", "send Authorization: Bearer TOKEN"
            )

    return Depends(check)


def _require_local(request: Request) -> None:
    """Raise ApiError for what a foreign page has a browser on this machine send.

    Such a page may have its own name resolve to loopback, or send a form here: either shows in the headers.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not _is_loopback(name) or (origin is not None and origin.partition("://")[2] != host):
        raise ApiError(
            403,
            "not_local",
            "without tokens, only requests to loopback by its name or address are answered",
            "ask 127.0.0.1, or set tokens under [auth]",
        )


async def disconnected(receive: Receive) -> None:
    """Wait until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def blob_ticket(token: str, digest: str) -> str:
    """Prove knowledge of a token to a peer without showing it: opens one blob, and nothing else."""
    return hmac.new(token.encode(), f"blob {digest}".encode(), "sha256").hexdigest()


class _DeclaredBodyLimit:
    """Refuses bodies that say they are too large, as errors are told: Starlette's limit writes plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] != "http" or int(declared) <= MAX_BODY:  # uvicorn refuses what is no number
            await self._app(scope, receive, send)
            return
        refusal = StarletteHTTPException(413)
        await (await _on_http_error(Request(scope), refusal))(scope, receive, send)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if not isinstance(error, ApiError) or error.status_code in (401, 403):
        await request.app.state.refusals.turn()
    code = error.code if isinstance(error, ApiError) else _CODES.get(error.status_code, "error")
    hint = error.hint if isinstance(error, ApiError) else "see /docs for the routes"
    return _error(error.status_code, code, str(error.detail), hint, error.headers)


async def _on_bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    await request.app.state.refusals.turn()  # a body is parsed before a token is asked for
    first = error.errors()[0]
    return _error(422, "bad_request", f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "see /docs")


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    return _error(500, "internal", f"{type(error).__name__} in {request.url.path}", "see the service's log")


def _error(
    status: int, code: str, message: str, hint: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    body = ErrorBody(error=ErrorDetail(code=code, message=message, hint=hint))
    challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body.model_dump(), status_code=status, headers={**(headers or {}), **challenge})


def listen(host: str, port: int, auth: AuthConfig) -> socket.socket:
    """Bind a TCP socket; raises `ServeError` for a port in use, or a public address without tokens."""
    if not _is_loopback(host) and not auth.tokens:
        raise ServeError(
            f"refusing to serve on {host} without tokens; set auth.reader_token, auth.actor_token and "
            "auth.operator_token, or serve on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot serve on {host}:{port} ({error.strerror}); choose another port, or 0"
        ) from None
    return listener


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service will answer; bound at once, so that a mistake shows before anything heavy is loaded."""

    listener: socket.socket
    probes: socket.socket | None
    tls: ssl.SSLContext | None

    def serve(self, app: FastAPI) -> Server:
        """Make the server of an app at this place."""
        return Server(app, self.listener, self.tls, probes=self.probes)


def bind(config: HttpConfig, auth: AuthConfig) -> Place:
    """Bind a service's ports and load its certificate; raises `ServeError` and `TlsError`."""
    tls = server_context(config.tls_cert, config.tls_key)
    listener = listen(config.host, config.port, auth)
    probes = None if config.probe_port is None else listen(config.host, config.probe_port, auth)
    return Place(listener, probes, tls)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reachable(url: str) -> str | None:
    """Give the URL if it names one address, None for a service that listens on all of them."""
    return None if "//0.0.0.0:" in url or "//[::]:" in url else url


class Server:
    """uvicorn in a thread of its own, so that the caller's thread can train; use as a context manager.

    `probes` is a bound socket on which the app's probes alone are served too, in one more thread.
    """

    def __init__(
        self,
        app: FastAPI,
        listener: socket.socket,
        tls: ssl.SSLContext | None = None,
        *,
        probes: socket.socket | None = None,
        limits: Limits = _LIMITS,
    ) -> None:
        self._app, self._listener, self._tls = app, listener, tls
        self._probes = Server(app.state.probes, probes, tls) if probes else None
        self._loop: asyncio.AbstractEventLoop | None = None
        config = uvicorn.Config(
            app,
            http=functools.partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]
            ws="none",
            log_config=None,  # log lines are ours to escape
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=2,
            ssl_context_factory=(lambda _config, _default: tls) if tls else None,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where the service answers."""
        return url_of(self._listener, "https" if self._tls else "http")

    def _run(self) -> None:
        # What strangers can bring about at will is not logged.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        logging.getLogger("uvicorn.error").addFilter(_tells_of_no_hangup)
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[self._listener]))

    def __enter__(self) -> Self:
        self._thread.start()
        if self._probes:
            self._probes.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._probes:
            self._probes.__exit__(kind, error, trace)
        self._server.should_exit = True
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._app.state.closing.set)
        self._thread.join(timeout=10)


def _tells_of_no_hangup(record: logging.LogRecord) -> bool:
    """Leave out uvloop's complaint that a client has gone before it was answered."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, RuntimeError) and "the handler is closed" in str(error))


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Give the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
