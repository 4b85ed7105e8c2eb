"""OpenAI's requests, and their translation to Ollama's. Pure functions; what cannot be honoured is a BadRequest that names it.

`options`, `keep_alive`, `top_k` and `min_p` are extensions: clients pass them as extra body fields.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollamapy.api.messages import Tool
from ollamapy.api.openai_format import Structured, asked_format
from ollamapy.api.openai_messages import ChatMessage, translated
from ollamapy.api.types import MAX_TOP_LOGPROBS, ChatRequest, EmbedRequest, GenerateRequest
from ollamapy.errors import BadRequest, ContextOverflow, OllamapyError, Unauthorized

_ERROR_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "not_found_error"}
_ERROR_CODES: dict[type[OllamapyError], str] = {ContextOverflow: "context_length_exceeded", Unauthorized: "invalid_api_key"}
_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Sampled(Structured, kw_only=True):
    """What both completion requests have in common. Fields that are not here are accepted and have no effect."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: Any = None
    n: int = 1
    logit_bias: dict[str, float] = {}
    options: dict[str, Any] = {}
    keep_alive: Any = None
    service_tier: str = ""
    cache_salt: str | None = None
    debug_render_only: bool = msgspec.field(name="_debug_render_only", default=False)


class ChatCompletionRequest(Sampled, kw_only=True):
    messages: list[ChatMessage] = []
    max_completion_tokens: int | None = None
    tools: list[Tool] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    functions: list[Any] = []
    modalities: list[str] = []
    reasoning_effort: str = ""
    reasoning: dict[str, Any] = {}
    logprobs: bool = False
    top_logprobs: int = 0


class CompletionRequest(Sampled, kw_only=True):
    prompt: Any = ""
    suffix: str = ""
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    model: str = ""
    input: Any = None
    dimensions: int = 0
    encoding_format: str = "float"
    options: dict[str, Any] = {}
    keep_alive: Any = None
    service_tier: str = ""


def to_chat(request: ChatCompletionRequest) -> ChatRequest:
    """Raises BadRequest. A prompt that does not fit the context is an error here, never cut."""
    if not request.messages:
        raise BadRequest("[] is too short - 'messages'")
    if 0 < request.top_logprobs <= MAX_TOP_LOGPROBS and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true")
    _refuse(
        {
            "functions": bool(request.functions),
            "modalities other than text": any(modality != "text" for modality in request.modalities),
        }
    )
    return ChatRequest(
        model=request.model,
        messages=[message for given in request.messages for message in translated(given, request.messages)],
        tools=request.tools,
        tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls,
        stream=request.stream,
        format=asked_format(request),
        options=_options(request, request.max_completion_tokens),
        keep_alive=request.keep_alive,
        think=_think(request),
        truncate=False,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        logit_bias=request.logit_bias,
        service_tier=request.service_tier,
        cache_salt=request.cache_salt or "",
        debug_render_only=request.debug_render_only,
    )


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Each a text or token ids; one at least. Raises BadRequest."""
    given = request.prompt
    several = given if isinstance(given, list) and not _are_ids(given) else [given]
    if not several or not all(isinstance(one, str) or (one and _are_ids(one)) for one in several):
        raise BadRequest("prompt must be a string, a list of token ids, or a list of either; none of them empty")
    return several


def _are_ids(given: object) -> bool:
    return isinstance(given, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in given) and bool(given)


def to_generate(request: CompletionRequest, prompt: str) -> GenerateRequest:
    """Of one of the prompts. Raises BadRequest. `logprobs: N` asks for the N likeliest tokens besides the one chosen."""
    if request.best_of not in (None, request.n):
        raise BadRequest("best_of: only n choices are generated, best_of must be equal to n")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
        raise BadRequest(f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    if request.echo and request.suffix:
        raise BadRequest("echo cannot be combined with suffix")
    if isinstance(request.stop, list) and not all(isinstance(item, str) for item in request.stop):
        raise BadRequest("invalid type for 'stop' field: a string or a list of strings is expected")
    return GenerateRequest(
        model=request.model,
        prompt=prompt,
        suffix=request.suffix,
        stream=request.stream,
        format=asked_format(request),
        options=_options(request),
        keep_alive=request.keep_alive,
        truncate=False,
        logprobs=request.logprobs is not None,
        top_logprobs=request.logprobs or 0,
        logit_bias=request.logit_bias,
        service_tier=request.service_tier,
        cache_salt=request.cache_salt or "",
        debug_render_only=request.debug_render_only,
    )


def to_embed(request: EmbeddingRequest) -> EmbedRequest:
    """Raises BadRequest."""
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not texts or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("invalid input")
    if request.encoding_format not in ("float", "base64"):
        raise BadRequest(f"invalid encoding_format: {request.encoding_format!r} (must be 'float' or 'base64')")
    return EmbedRequest(
        model=request.model,
        input=texts,
        dimensions=request.dimensions,
        truncate=False,
        options=request.options,
        keep_alive=request.keep_alive,
        service_tier=request.service_tier,
    )


def error(failure: OllamapyError, text: str) -> dict[str, Any]:
    """The error body; `text` is what is shown of the failure."""
    code = next((code for kind, code in _ERROR_CODES.items() if isinstance(failure, kind)), None)
    kind = _ERROR_TYPES.get(failure.status, "api_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def _refuse(asked: dict[str, bool]) -> None:
    for feature, present in asked.items():
        if present:
            raise BadRequest(f"{feature}: not supported yet")


def _options(request: Sampled, max_completion_tokens: int | None = None) -> dict[str, Any]:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    given = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p or 1.0,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "seed": request.seed,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "num_predict": request.max_tokens if max_completion_tokens is None else max_completion_tokens,
        "stop": [text for text in stop if isinstance(text, str)] if isinstance(stop, list) else None,
    }
    return {**{name: value for name, value in given.items() if value is not None}, **request.options}


def _think(request: ChatCompletionRequest) -> bool | str | None:
    effort = request.reasoning.get("effort") or request.reasoning_effort
    if not effort:
        return None
    if effort not in _EFFORTS:
        raise BadRequest(f"invalid reasoning value: {effort!r} (must be one of {', '.join(_EFFORTS)})")
    return _EFFORTS[effort]
