"""Handlers of /v1: OpenAI's requests to ours, our answers to OpenAI's. The translations are in `api.openai`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ollamapy.api import openai, openai_responses
from ollamapy.api.openai import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, Sampled
from ollamapy.api.openai_responses import ChatStream, Choices, CompletionStream
from ollamapy.api.types import ChatRequest, GenerateRequest, GenerateResponse
from ollamapy.errors import NotFound
from ollamapy.server import embedding
from ollamapy.server.body import read
from ollamapy.server.catalog import parse_name, require_name, services
from ollamapy.server.choices import Once, check_choices, seed_of, side_by_side
from ollamapy.server.inference import Prompts, Verbatim, chat_lines, fold_chat, fold_generate, generate_lines
from ollamapy.server.stream import JSON, SSE, Streamed, collected, warning_header
from ollamapy.store.library import ModelSummary

AnyRequest = TypeVar("AnyRequest", ChatRequest, GenerateRequest)


async def chat_completions(request: Request) -> Response:
    asked = await read(request, ChatCompletionRequest)
    check_choices(1, asked.n)
    warnings: list[str] = []
    once: Prompts = Once()
    starts = [
        partial(chat_lines, services(request), _with_seed(openai.to_chat(asked), choice), warnings, once)
        for choice in range(asked.n)
    ]
    forms = [ChatStream(asked.model, include_usage=asked.stream_options.include_usage, index=i) for i in range(asked.n)]
    return await _answer(asked, starts, forms, fold_chat, warnings)


async def completions(request: Request) -> Response:
    """Token ids, and with `echo` texts too, go to the model as they stand; other texts through its template, as in Ollama."""
    asked = await read(request, CompletionRequest)
    require_name(asked.model)
    prompts = openai.prompts(asked)
    check_choices(len(prompts), asked.n)
    warnings: list[str] = []
    starts = [start for prompt in prompts for start in _completions(request, asked, prompt, warnings)]
    include_usage = asked.stream_options.include_usage
    forms = [CompletionStream(asked.model, include_usage=include_usage, index=i) for i in range(len(starts))]
    return await _answer(asked, starts, forms, fold_generate, warnings)


def _completions(
    request: Request, asked: CompletionRequest, prompt: str | list[int], warnings: list[str]
) -> list[Callable[[], AsyncGenerator[GenerateResponse]]]:
    """All choices of one prompt."""
    text, ids = (prompt, None) if isinstance(prompt, str) else ("", prompt)
    verbatim = Verbatim(ids, asked.echo) if ids is not None or asked.echo else None
    once: Prompts = Once()
    each = [_with_seed(openai.to_generate(asked, text), choice) for choice in range(asked.n)]
    return [partial(generate_lines, services(request), generate, warnings, verbatim, once) for generate in each]


async def _answer(
    asked: Sampled,
    starts: Sequence[Callable[[], AsyncGenerator[Any]]],
    forms: Sequence[Any],
    fold: Callable[[Any], Any],
    warnings: list[str],
) -> Response:
    if len(starts) == 1:
        lines = starts[0]()
        if asked.stream:
            return Streamed(lines, SSE(forms[0].feed), warnings)
        return JSON(forms[0].whole(fold(await collected(lines))), headers=warning_header(warnings))
    choices = Choices(forms, asked.n)
    told = side_by_side(starts)
    if asked.stream:
        return Streamed(told, SSE(choices.feed), warnings)
    parts: list[list[Any]] = [[] for _ in starts]
    async for index, line in told:
        parts[index].append(line)
    return JSON(choices.whole([fold(part) for part in parts]), headers=warning_header(warnings))


def _with_seed(request: AnyRequest, choice: int) -> AnyRequest:
    seed = request.options.get("seed")
    if choice and isinstance(seed, int):
        request.options = {**request.options, "seed": seed_of(seed, choice)}
    return request


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
