"""The application: one list of routes, the middleware, the error map, what starts and ends with it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ollamapy import __version__
from ollamapy.api.address import Address
from ollamapy.env import Settings
from ollamapy.errors import NotSupported, OllamapyError, ServerBusy
from ollamapy.lifecycle.residents import Residents
from ollamapy.server import compat, inference, library, metrics, tracing
from ollamapy.server.catalog import Services
from ollamapy.server.keys import Keys, read_keys
from ollamapy.server.middleware import REQUEST_ID_HEADER, Disconnects, Guard, Recorded
from ollamapy.server.record import Totals, current
from ollamapy.server.stream import INTERNAL, JSON, error_response
from ollamapy.store.library import Library

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
_PLAIN = {404: "404 page not found", 405: "405 method not allowed"}


async def root(request: Request) -> Response:
    return PlainTextResponse("Ollama is running")


async def version(request: Request) -> Response:
    return JSON({"version": __version__})


async def status(request: Request) -> Response:
    return JSON({"cloud": {"disabled": True, "source": "config"}})


def unbuilt(feature: str) -> Handler:
    """A route of Ollama's that is not served yet says so."""

    async def refuse(request: Request) -> Response:
        raise NotSupported(f"{feature}: not supported yet")

    return refuse


def routes() -> list[Route]:
    table: list[tuple[str, str, Handler]] = [
        ("GET HEAD", "/", root),
        ("GET HEAD", "/api/version", version),
        ("GET", "/api/status", status),
        ("POST", "/api/generate", inference.generate),
        ("POST", "/api/chat", inference.chat),
        ("POST", "/api/embed", inference.embed),
        ("POST", "/api/embeddings", inference.embeddings),
        ("GET HEAD", "/api/tags", library.tags),
        ("GET", "/api/ps", library.ps),
        ("POST", "/api/show", library.show),
        ("POST", "/api/create", library.create_model),
        ("POST", "/api/copy", library.copy),
        ("DELETE", "/api/delete", library.delete),
        ("HEAD", "/api/blobs/{digest}", library.blob_head),
        ("POST", "/api/blobs/{digest}", library.blob_post),
        ("POST", "/api/pull", unbuilt("pull")),
        ("POST", "/api/push", unbuilt("push")),
        ("POST", "/api/me", unbuilt("cloud accounts")),
        ("POST", "/api/signout", unbuilt("cloud accounts")),
        ("POST", "/v1/chat/completions", compat.chat_completions),
        ("POST", "/v1/completions", compat.completions),
        ("POST", "/v1/embeddings", compat.embeddings),
        ("GET", "/v1/models", compat.models),
        ("GET", "/v1/models/{model:path}", compat.model),
        ("POST", "/v1/responses", unbuilt("responses")),
        ("POST", "/v1/messages", unbuilt("messages")),
        ("POST", "/v1/audio/transcriptions", unbuilt("audio transcriptions")),
    ]
    return [_route(methods.split(), path, handler) for methods, path, handler in table]


def _route(methods: list[str], path: str, handler: Handler) -> Route:
    made = Route(path, handler, methods=methods)
    made.methods = set(methods)  # Starlette adds HEAD to every GET; Ollama answers 405 on most
    return made


def create_app(
    settings: Settings, residents: Residents | None = None, metrics_sockets: list[socket.socket] | None = None
) -> Starlette:
    """The server. Its lifespan starts the process that engines are forked from, and ends all engines.

    `metrics_sockets`: listen already, on the address of `settings.metrics`. Raises KeysError.
    """
    services = Services(settings, Library(settings.models, noprune=settings.noprune), residents or Residents(settings))
    address, totals = Address.parse(settings.host), Totals()
    spans = tracing.start(settings.otlp_endpoint)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        services.residents.start()
        pruning = asyncio.create_task(_prune(services.library))
        try:
            async with AsyncExitStack() as stack:
                if metrics_sockets:
                    shown = metrics.Metrics(totals, services.residents)
                    await stack.enter_async_context(metrics.serving(shown, Address.parse(settings.metrics), metrics_sockets))
                gc.freeze()  # what start-up made stays; collections while tokens flow need not walk it
                yield
        finally:
            await services.residents.close()
            await services.formats.close()
            await pruning
            if spans is not None:
                await asyncio.to_thread(spans.close)

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, OllamapyError)
        if isinstance(error, ServerBusy) and error.limit:
            totals.refused[current().model, error.limit] += 1
        if error.status >= 500 and not isinstance(error, NotSupported):
            log.error("%s %s: %s", request.method, request.url.path, error)
        return error_response(request.url.path, error)

    app = Starlette(
        routes=routes(),
        middleware=[
            Middleware(Recorded, totals, spans),
            Middleware(Guard, address, settings.origins),
            Middleware(Keys, read_keys(settings.api_keys)),
            Middleware(Disconnects),
        ],
        exception_handlers={OllamapyError: failed, HTTPException: _refused, Exception: _broken},
        lifespan=lifespan,
    )
    app.state.services = services
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Routing found nothing: plain text, as Ollama's router answers."""
    assert isinstance(error, HTTPException)
    return PlainTextResponse(_PLAIN.get(error.status_code, error.detail), error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """A bug of ours: its text stays in the log (Starlette raises it again, and the server logs it)."""
    response = error_response(request.url.path, OllamapyError(INTERNAL))
    response.headers[REQUEST_ID_HEADER] = current().id
    return response


async def _prune(library: Library) -> None:
    try:
        await asyncio.to_thread(library.prune)
    except OllamapyError as error:
        log.warning("the model store was not cleaned up: %s", error)
