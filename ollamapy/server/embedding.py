"""Vectors of texts: encode, cut, run together, normalise. Knows no HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from typing import Any

from ollamapy.api import options as option_table
from ollamapy.api.decode import lifetime
from ollamapy.api.types import EmbedRequest, EmbedResponse
from ollamapy.engine.protocol import Embedding
from ollamapy.errors import BadRequest, EngineError, NotFound, NotSupported
from ollamapy.lifecycle.resident import LoadedModel
from ollamapy.server.caller import with_tier
from ollamapy.server.catalog import Services
from ollamapy.server.record import current
from ollamapy.store.library import LocalModel
from ollamapy.tokenizer import Tokenizer

MAX_INPUTS = 2048
TOGETHER = 64  # of a request's texts in the engine at a time: twice what fills a step, and others come between
COUNTED = 8  # texts in the engine that count as one request in the limits of the queue
_THREAD_CHARS = 16384  # more text than this is encoded in a thread


async def embed(services: Services, request: EmbedRequest, warnings: list[str], *, normalize: bool = True) -> EmbedResponse:
    """One vector per input, in order. Nothing to embed only loads the model.

    Raises BadRequest for inputs of the wrong type or length, EngineError for a vector that is not finite.
    """
    arrival = time.monotonic_ns()
    record = current()
    record.caller = with_tier(record.caller, request.service_tier)
    texts = _texts(request.input)
    if request.dimensions < 0:
        raise BadRequest("dimensions must not be negative")
    try:
        model = await services.open(request.model)
    except NotFound:
        if not request.model:
            raise
        raise NotFound(f'model "{request.model}" not found, try pulling it first') from None
    if model.config.remote_host:
        raise NotSupported(f"cloud models are not supported: {request.model}")
    if model.adapter_paths:
        raise NotSupported(f"embeddings of a model with adapters are not supported: {request.model}")
    weight = max(1, min(len(texts), TOGETHER) // COUNTED)
    options, notes = option_table.merge(model.params, request.options)
    warnings += notes
    async with services.residents.use(model, options, lifetime(request.keep_alive), record.caller.client, weight) as loaded:
        load_ns = time.monotonic_ns() - arrival
        limit = min(options.num_ctx or loaded.context_length, loaded.max_context)
        encoded = await _encode_all(texts, loaded.tokenizer)
        total = sum(map(len, encoded))
        encoded = [_cut(ids, loaded.tokenizer, limit, request.truncate) for ids in encoded]
        num_waiting = loaded.engine.num_waiting
        embeddings = await _run(loaded, encoded)
    num_tokens = sum(map(len, encoded))
    account = record.answer(num_tokens, num_waiting)
    account.queue_ns = min((each.queue_ns for each in embeddings), default=0)
    account.generated("stop", 0, 0, 0)
    if num_tokens < total:
        warnings.append(f"the input was truncated: {total - num_tokens} of its {total} tokens were cut")
    return EmbedResponse(
        model=request.model,
        embeddings=[_finished(array("f", each.vector), request.dimensions, normalize) for each in embeddings],
        total_duration=time.monotonic_ns() - arrival,
        load_duration=load_ns,
        prompt_eval_count=num_tokens,
        truncated=num_tokens < total,
        prompt_tokens_total=total if num_tokens < total else 0,
    )


def _texts(given: Any) -> list[str]:
    if given is None or given == "":
        return []
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input type")
    if len(texts) > MAX_INPUTS:
        raise BadRequest(f"too many inputs: {len(texts)}, at most {MAX_INPUTS} in one request")
    return texts


async def _encode_all(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [_encode(text, tokenizer) for text in texts]

    return await asyncio.to_thread(encode) if sum(map(len, texts)) > _THREAD_CHARS else encode()


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text without tokens of its own stands for the beginning (or the end) of any text."""
    ids = tokenizer.encode(text, add_special=True)
    lone = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return ids or [0 if lone is None else lone]


def _cut(ids: list[int], tokenizer: Tokenizer, limit: int, truncate: bool) -> list[int]:
    """At most `limit` tokens; the special ones around the text stay."""
    if len(ids) <= limit:
        return ids
    if not truncate:
        raise BadRequest(f"the input length exceeds the context length: {len(ids)} tokens, at most {limit}")
    tail = int(tokenizer.add_eos)
    if limit - tail - int(tokenizer.add_bos) <= 0:
        raise BadRequest("input after truncation exceeds maximum context length")
    return ids[: limit - tail] + ids[len(ids) - tail :]


async def _run(loaded: LoadedModel[LocalModel], encoded: list[list[int]]) -> list[Embedding]:
    """TOGETHER at a time; the first failure ends the others."""
    room = asyncio.Semaphore(TOGETHER)

    async def one(ids: list[int]) -> Embedding:
        async with room:
            return await loaded.engine.embed(ids, current().caller)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(ids)) for ids in encoded]
    except* Exception as failures:
        first: BaseException = failures
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]


def _finished(vector: array[float], dimensions: int, normalize: bool) -> list[float]:
    values = list(vector[:dimensions]) if dimensions else list(vector)
    norm = math.sqrt(math.fsum(value * value for value in values))
    if not math.isfinite(norm):
        raise EngineError("embedding contains NaN or Inf values")
    scale = 1.0 / norm if normalize and norm > 0 else 1.0
    # 9 digits are what a float32 has; more would only make the JSON longer
    return [float(f"{value * scale:.9g}") for value in values]
