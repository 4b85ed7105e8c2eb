"""Handlers of /api/generate, /api/chat, /api/embed, /api/embeddings; and their answers as streams, which /v1 uses too."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ollamapy.api.messages import AnswerMessage, Message
from ollamapy.api.types import (
    ChatRequest,
    ChatResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    GenerateRequest,
    GenerateResponse,
    Reply,
)
from ollamapy.chat.format import ChatFormat, Think
from ollamapy.server import embedding
from ollamapy.server.body import read
from ollamapy.server.catalog import Services, require_name, services
from ollamapy.server.choices import Once
from ollamapy.server.prompt import Prompt, Room, chat_prompt, conversation, ids_prompt, text_prompt
from ollamapy.server.stream import JSON, NDJSON, Streamed, collected, warning_header
from ollamapy.server.tools import tool_use
from ollamapy.server.turn import Turn, run, timestamp
from ollamapy.store.library import LocalModel
from ollamapy.tokenizer import Tokenizer

MAX_TEMPLATE = 64 << 10  # characters of a request's own; what is made of it is kept for the next one
MAX_MESSAGES = 4096
Line = TypeVar("Line", bound=Reply)


async def generate(request: Request) -> Response:
    asked = await read(request, GenerateRequest)
    warnings: list[str] = []
    lines = generate_lines(services(request), asked, warnings)
    if asked.stream:
        wire = NDJSON(lambda: GenerateResponse(model=asked.model, created_at=timestamp(), done=False, response=""))
        return Streamed(lines, wire, warnings, single=lambda line: line.done)
    return JSON(fold_generate(await collected(lines)), headers=warning_header(warnings))


async def chat(request: Request) -> Response:
    asked = await read(request, ChatRequest)
    warnings: list[str] = []
    lines = chat_lines(services(request), asked, warnings)
    if asked.stream:
        nothing = AnswerMessage(role="assistant", content="")
        wire = NDJSON(lambda: ChatResponse(model=asked.model, created_at=timestamp(), done=False, message=nothing))
        return Streamed(lines, wire, warnings, single=lambda line: line.done)
    return JSON(fold_chat(await collected(lines)), headers=warning_header(warnings))


async def embed(request: Request) -> Response:
    asked = await read(request, EmbedRequest)
    warnings: list[str] = []
    answer = await embedding.embed(services(request), asked, warnings)
    return JSON(answer, headers=warning_header(warnings))


async def embeddings(request: Request) -> Response:
    """The older form: one text, one vector, as the model gives it."""
    asked = await read(request, EmbeddingsRequest)
    require_name(asked.model)
    warnings: list[str] = []
    of_one = EmbedRequest(
        model=asked.model, input=[asked.prompt] if asked.prompt else [], options=asked.options, keep_alive=asked.keep_alive
    )
    answer = await embedding.embed(services(request), of_one, warnings, normalize=False)
    vector = answer.embeddings[0] if answer.embeddings else []
    return JSON(EmbeddingsResponse(vector), headers=warning_header(warnings))


Prompts = Once[Prompt]


class Verbatim(NamedTuple):
    """A prompt that no template touches: the request's text, or these ids in place of it. `echo`: it comes first."""

    ids: list[int] | None = None
    echo: bool = False


async def generate_lines(
    services: Services,
    request: GenerateRequest,
    warnings: list[str],
    verbatim: Verbatim | None = None,
    once: Prompts | None = None,
) -> AsyncGenerator[GenerateResponse]:
    conflict = ""
    if request.raw and bool(request.template or request.system or request.context):
        conflict = "raw mode does not support template, system, or context"
    elif len(request.template) > MAX_TEMPLATE:
        conflict = f"template: more than {MAX_TEMPLATE} characters"
    turn = Turn(
        empty=not (request.prompt or (verbatim is not None and verbatim.ids)),
        needs=_generate_needs(request),
        prompt=lambda model, format, think, tokenizer, room: _generate_prompt(
            request, model, format, think, tokenizer, room, verbatim
        ),
        template=request.template,
        raw=request.raw or verbatim is not None,
        echo=verbatim is not None and verbatim.echo,
        conflict=conflict,
        unsupported="images" if request.images else "",
        once=once or Once(),
    )
    async with aclosing(run(services, request, turn, warnings)) as pieces:
        async for said in pieces:
            yield GenerateResponse(
                model=request.model,
                created_at=timestamp(),
                response=said.piece.content,
                thinking=said.piece.thinking,
                logprobs=list(said.piece.logprobs),
                prompt_logprobs=list(said.piece.prompt_logprobs),
                context=[] if request.raw else said.context,
                **said.fields,
            )


async def chat_lines(
    services: Services, request: ChatRequest, warnings: list[str], once: Prompts | None = None
) -> AsyncGenerator[ChatResponse]:
    require_name(request.model)
    needs = {"completion": f'"{request.model}" does not support chat'}
    tools = tool_use(request)
    if tools:
        needs["tools"] = f"{request.model} does not support tools"
    turn = Turn(
        empty=not request.messages,
        needs=needs,
        prompt=lambda model, format, think, tokenizer, room: chat_prompt(
            conversation(model, request.messages), format, think, tokenizer, room, tools=tools.tools if tools else ()
        ),
        conflict=f"messages: more than {MAX_MESSAGES}" if len(request.messages) > MAX_MESSAGES else "",
        unsupported="images" if any(message.images for message in request.messages) else "",
        tools=tools,
        once=once or Once(),
    )
    async with aclosing(run(services, request, turn, warnings)) as pieces:
        async for said in pieces:
            piece = said.piece
            message = AnswerMessage(
                role="assistant", content=piece.content, thinking=piece.thinking, tool_calls=list(piece.tool_calls)
            )
            yield ChatResponse(
                model=request.model,
                created_at=timestamp(),
                message=message,
                logprobs=list(piece.logprobs),
                **said.fields,
            )


def fold_generate(lines: Sequence[GenerateResponse]) -> GenerateResponse:
    """The whole answer as one object: texts and logprobs joined, the rest as in the last line."""
    last = lines[-1]
    last.response = "".join(line.response for line in lines)
    last.thinking = "".join(line.thinking for line in lines)
    last.prompt_logprobs = [entry for line in lines for entry in line.prompt_logprobs]
    return _with_logprobs(last, lines)


def fold_chat(lines: Sequence[ChatResponse]) -> ChatResponse:
    """As `fold_generate`."""
    last = lines[-1]
    content = "".join(line.message.content for line in lines)
    thinking = "".join(line.message.thinking for line in lines)
    calls = [call for line in lines for call in line.message.tool_calls]
    last.message = AnswerMessage(role="assistant", content=content, thinking=thinking, tool_calls=calls)
    return _with_logprobs(last, lines)


def _with_logprobs(last: Line, lines: Sequence[Reply]) -> Line:
    last.logprobs = [entry for line in lines for entry in line.logprobs]
    return last


def _generate_needs(request: GenerateRequest) -> dict[str, str]:
    needs = {"completion": f'"{request.model}" does not support generate'}
    if request.suffix:
        needs["insert"] = f"{request.model} does not support insert"
    return needs


def _generate_prompt(
    request: GenerateRequest,
    model: LocalModel,
    format: ChatFormat,
    think: Think,
    tokenizer: Tokenizer,
    room: Room,
    verbatim: Verbatim | None,
) -> Prompt:
    if verbatim is not None and verbatim.ids is not None:
        return ids_prompt(verbatim.ids, tokenizer, room)
    if request.raw or verbatim is not None:
        return text_prompt(request.prompt, tokenizer, room)
    if request.suffix:
        return text_prompt(format.render_completion(request.prompt, suffix=request.suffix, think=think), tokenizer, room)
    user = Message(role="user", content=request.prompt)
    asked = [Message(role="system", content=request.system), user] if request.system else [user]
    if not request.context:
        return chat_prompt(conversation(model, asked), format, think, tokenizer, room)
    if model.system and not request.system:
        asked.insert(0, Message(role="system", content=model.system))
    before = tokenizer.decode(request.context, skip_special=False)
    return chat_prompt(asked, format, think, tokenizer, room, before)
