"""Handlers of the model store: tags, ps, show, copy, delete, create, blobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollamapy import create, modelfile
from ollamapy.api.types import (
    CopyRequest,
    CreateRequest,
    ListedModel,
    ListResponse,
    ModelRequest,
    Progress,
    RunningModel,
    RunningResponse,
    ShowResponse,
)
from ollamapy.chat.capabilities import CHAT_TEMPLATE
from ollamapy.errors import BadRequest, ClientGone, EngineError, NotFound
from ollamapy.lifecycle.resident import Running
from ollamapy.names import ModelName
from ollamapy.server.body import chunks, declared_length, read
from ollamapy.server.catalog import details, parse_name, read_model_info, require_name, services, shown_template
from ollamapy.server.stream import JSON, NDJSON, Streamed, collected
from ollamapy.store.digest import Digest
from ollamapy.store.library import LocalModel, ModelSummary

FOREVER = timedelta(days=292 * 365)  # how a model that is never unloaded says when it will be
STATS_TIMEOUT = 10.0  # seconds; a step of a big prompt takes some, and an engine that is stopped takes for ever
_WRITE_BYTES = 4 << 20  # of an upload, written and hashed in a thread at a time


async def tags(request: Request) -> Response:
    found = await asyncio.to_thread(services(request).library.list)
    return JSON(ListResponse([_listed(model) for model in found]))


async def ps(request: Request) -> Response:
    """With `?verbose=1` also what each engine is and does, and the tasks that the daemon has."""
    verbose = request.query_params.get("verbose") in ("1", "true")
    models = services(request).residents.running()
    rows = [_running(model) for model in models]
    if not verbose:
        return JSON(RunningResponse(rows))
    told = await asyncio.gather(*(_engine(model) for model in models))
    for row, facts in zip(rows, told, strict=True):
        row.engine = facts
    return JSON(RunningResponse(rows, {"tasks": len(asyncio.all_tasks())}))


async def show(request: Request) -> Response:
    asked = await read(request, ModelRequest)
    require_name(asked.target)
    model = await services(request).open(asked.target)
    shown = _shown(model, asked)
    metadata: dict[str, Any] = {}
    if model.model_path is not None and model.model_path.is_file():
        info, tensors = await asyncio.to_thread(read_model_info, model.model_path, verbose=asked.verbose)
        shown.template = shown_template(model, info, services(request).settings.go_template)
        metadata = dict(info)
        info.pop(CHAT_TEMPLATE, None)
        shown.model_info, shown.tensors = info, tensors
    if model.projector_paths:
        shown.projector_info, _ = await asyncio.to_thread(read_model_info, model.projector_paths[0], verbose=asked.verbose)
    if request.headers.get("user-agent", "").startswith("GitHubCopilotChat/"):
        shown.model_info["general.basename"] = asked.target
    shown.capabilities = await services(request).capabilities(model, metadata)
    return JSON(shown)


async def copy(request: Request) -> Response:
    asked = await read(request, CopyRequest)
    source = _name(asked.source, f'source "{asked.source}" is invalid')
    destination = _name(asked.destination, f'destination "{asked.destination}" is invalid')
    try:
        await asyncio.to_thread(services(request).library.copy, source, destination)
    except NotFound:
        raise NotFound(f'model "{asked.source}" not found') from None
    return Response()


async def delete(request: Request) -> Response:
    asked = await read(request, ModelRequest)
    name = _name(asked.target, f'name "{asked.target}" is invalid')
    await asyncio.to_thread(services(request).library.delete, name)
    return Response()


async def create_model(request: Request) -> Response:
    asked = await read(request, CreateRequest)
    library = services(request).library
    lines = in_thread(lambda report: create.create_model(asked, library, report))
    if asked.stream:
        return Streamed(lines, NDJSON())
    return JSON((await collected(lines))[-1])


async def blob_head(request: Request) -> Response:
    """Whoever is told that a blob is there will ask for it: it is held for an hour."""
    library, digest = services(request).library, Digest.parse(request.path_params["digest"])
    if not await asyncio.to_thread(library.blobs.has, digest):
        raise NotFound(f"blob {digest} not found")
    await asyncio.to_thread(library.hold, digest)
    return Response()


async def blob_post(request: Request) -> Response:
    library, digest = services(request).library, Digest.parse(request.path_params["digest"])
    if await asyncio.to_thread(library.blobs.has, digest):
        await asyncio.to_thread(library.hold, digest)
        return Response(status_code=200)
    await _receive(request, digest)
    return Response(status_code=201)


async def in_thread(work: Callable[[Callable[[Progress], None]], None]) -> AsyncGenerator[Progress]:
    """The progress of `work`, which runs in a thread. Closing this makes its next report raise ClientGone."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Progress | None] = asyncio.Queue()
    left = threading.Event()

    def report(progress: Progress) -> None:
        if left.is_set():
            raise ClientGone("the client has left")
        loop.call_soon_threadsafe(queue.put_nowait, progress)

    task = asyncio.ensure_future(asyncio.to_thread(work, report))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (progress := await queue.get()) is not None:
            yield progress
        await task
    finally:
        left.set()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also when nobody waits


async def _receive(request: Request, digest: Digest) -> None:
    library = services(request).library
    writer = library.blobs.ingest(digest, size=declared_length(request))
    pending = bytearray()
    writer.__enter__()
    try:
        async for chunk in chunks(request):
            pending += chunk
            if len(pending) >= _WRITE_BYTES:
                await asyncio.to_thread(writer.write, pending)
                pending = bytearray()
        await asyncio.to_thread(writer.write, pending)
    except BaseException as error:
        writer.__exit__(type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writer.__exit__, None, None, None)
    await asyncio.to_thread(library.hold, digest)


def _name(text: str, problem: str) -> ModelName:
    try:
        return parse_name(text)
    except (BadRequest, NotFound):
        raise BadRequest(problem) from None


def _listed(model: ModelSummary) -> ListedModel:
    return ListedModel(
        name=model.name.short(),
        model=model.name.short(),
        remote_model=model.config.remote_model,
        remote_host=model.config.remote_host,
        modified_at=model.modified_at.isoformat(),
        size=model.size,
        digest=model.digest,
        details=details(model.config),
        capabilities=model.config.capabilities,
    )


def _running(row: Running) -> RunningModel:
    expires = row.expires_at or datetime.now(UTC) + FOREVER
    return RunningModel(
        name=row.name.short(),
        model=row.name.short(),
        size=row.size,
        digest=row.digest,
        details=details(row.model.config, row.model.manifest),
        expires_at=expires.isoformat(),
        size_vram=row.size_vram,
        context_length=row.context_length,
        notes=list(row.notes),
    )


async def _engine(row: Running) -> dict[str, Any]:
    facts = {"requests": row.num_requests, "resident_bytes": row.resident_bytes, **msgspec.to_builtins(row.info)}
    facts["pid"] = row.engine.pid
    try:
        return {**facts, "stats": msgspec.to_builtins(await asyncio.wait_for(row.engine.stats(), STATS_TIMEOUT))}
    except TimeoutError:
        return {**facts, "error": f"the engine has not told its figures within {STATS_TIMEOUT:g} s"}
    except EngineError as error:  # it ends at this moment
        return {**facts, "error": str(error)}


def _shown(model: LocalModel, asked: ModelRequest) -> ShowResponse:
    config = model.config
    return ShowResponse(
        license="\n".join(model.licenses),
        modelfile=modelfile.from_model(model, system=asked.system or None, options=asked.options),
        parameters="\n".join(_parameter_lines(model.params)),
        template=model.template or "",
        system=asked.system or model.system,
        details=details(config, model.manifest),
        messages=model.messages,
        remote_model=config.remote_model,
        remote_host=config.remote_host,
        model_info={},
        modified_at=model.modified_at.isoformat(),
        requires=config.requires,
    )


def _parameter_lines(params: dict[str, Any]) -> list[str]:
    """Name padded to 30, then the value; strings in quotes, one line per element of a list."""
    lines = []
    for name, value in params.items():
        for item in value if isinstance(value, list) else [value]:
            shown = int(item) if isinstance(item, float) and item.is_integer() else item
            lines.append(f"{name:<30} {msgspec.json.encode(shown).decode()}")
    return lines
