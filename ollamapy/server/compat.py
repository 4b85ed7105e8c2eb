"""Handlers of /v1: OpenAI's requests to ours, our answers to OpenAI's. The translations are in `api.openai`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from ollamapy.api import openai, openai_responses
from ollamapy.api.openai import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from ollamapy.api.openai_responses import ChatStream, CompletionStream
from ollamapy.errors import NotFound
from ollamapy.server import embedding
from ollamapy.server.body import read
from ollamapy.server.catalog import parse_name, require_name, services
from ollamapy.server.inference import chat_lines, fold_chat, fold_generate, generate_lines
from ollamapy.server.stream import JSON, SSE, collected, streamed, warning_header
from ollamapy.store.library import ModelSummary


async def chat_completions(request: Request) -> Response:
    asked = await read(request, ChatCompletionRequest)
    warnings: list[str] = []
    lines = chat_lines(services(request), openai.to_chat(asked), warnings)
    form = ChatStream(asked.model, include_usage=asked.stream_options.include_usage)
    if asked.stream:
        return await streamed(lines, SSE(form.feed), warnings)
    return JSON(form.whole(fold_chat(await collected(lines))), headers=warning_header(warnings))


async def completions(request: Request) -> Response:
    asked = await read(request, CompletionRequest)
    require_name(asked.model)
    warnings: list[str] = []
    lines = generate_lines(services(request), openai.to_generate(asked), warnings)
    form = CompletionStream(asked.model, include_usage=asked.stream_options.include_usage)
    if asked.stream:
        return await streamed(lines, SSE(form.feed), warnings)
    return JSON(form.whole(fold_generate(await collected(lines))), headers=warning_header(warnings))


async def embeddings(request: Request) -> Response:
    asked = await read(request, EmbeddingRequest)
    require_name(asked.model)
    warnings: list[str] = []
    answer = await embedding.embed(services(request), openai.to_embed(asked), warnings)
    body = openai_responses.embeddings(answer, as_base64=asked.encoding_format == "base64")
    return JSON(body, headers=warning_header(warnings))


async def models(request: Request) -> Response:
    found = await asyncio.to_thread(services(request).library.list)
    return JSON({"object": "list", "data": [_model(model) for model in found]})


async def model(request: Request) -> Response:
    text = request.path_params["model"]
    name = parse_name(text)
    found = await asyncio.to_thread(services(request).library.list)
    for summary in found:
        if summary.name == name:
            return JSON(_model(summary, text))
    raise NotFound(f"model '{text}' not found")


def _model(model: ModelSummary, id: str = "") -> dict[str, object]:
    created = int(model.modified_at.timestamp())
    return openai_responses.model(id or model.name.short(), created, model.name.namespace)
