"""Ollama's answers in OpenAI's form. Pure: an answer or a line of one in, JSON objects out."""

from __future__ import annotations

import base64
import secrets
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ollamapy.api.messages import ToolCall
from ollamapy.api.types import ChatResponse, EmbedResponse, GenerateResponse, Logprob, Reply, TokenLogprob

_FINISH = {"repeat": "length"}


class _Stream:
    """What all objects of one response share. `feed` takes the lines of an answer in order; `whole` a folded one."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, *, include_usage: bool = False, index: int = 0) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(8)}"
        self.model, self.include_usage, self.index = model, include_usage, index
        self.created = int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        base = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**base, "system_fingerprint": "fp_ollama", "choices": choices, **more}

    def _chunk(self, choice: dict[str, Any], line: Reply) -> dict[str, Any]:
        more: dict[str, Any] = {"usage": None} if self.include_usage else {}
        if line.debug_info is not None:
            more["_debug_info"] = line.debug_info
        return self._object(self.chunk_kind, [{"index": self.index, **choice}], **more)

    def _usage_chunk(self, line: Reply) -> list[dict[str, Any]]:
        return [self._object(self.chunk_kind, [], usage=usage(line))] if self.include_usage else []

    def _whole(self, choice: dict[str, Any], answer: Reply, called: bool = False) -> dict[str, Any]:
        more: dict[str, Any] = {} if answer.debug_info is None else {"_debug_info": answer.debug_info}
        choice = {"index": self.index, **choice, "finish_reason": finish_reason(answer, called)}
        return self._object(self.kind, [choice], usage=usage(answer), **more)


class ChatStream(_Stream):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, *, include_usage: bool = False, index: int = 0) -> None:
        super().__init__(model, include_usage=include_usage, index=index)
        self._first = True
        self._called = False

    def feed(self, line: ChatResponse) -> list[dict[str, Any]]:
        """Reasoning and content go in chunks of their own; the last line adds a finish chunk, and usage if asked."""
        message, chunks = line.message, []
        if message.thinking:
            chunks.append(self._delta({"content": "", "reasoning": message.thinking}, line))
        if message.content or line.logprobs or (line.done and self._first):
            chunks.append(self._delta({"content": message.content}, line, logprobs=line.logprobs))
        if message.tool_calls:
            self._called = True
            chunks.append(self._delta({"tool_calls": tool_calls(message.tool_calls)}, line))
        if line.done:
            chunks.append(self._chunk({"delta": {}, "finish_reason": finish_reason(line, self._called)}, line))
            chunks += self._usage_chunk(line)
        return chunks

    def _delta(self, delta: dict[str, Any], line: Reply, logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        role = {"role": "assistant"} if self._first else {}
        self._first = False
        choice: dict[str, Any] = {"delta": {**role, **delta}, "finish_reason": None}
        if logprobs:
            choice["logprobs"] = chat_logprobs(logprobs)
        return self._chunk(choice, line)

    def whole(self, answer: ChatResponse) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.message.content}
        if answer.message.thinking:
            message["reasoning"] = answer.message.thinking
        calls = answer.message.tool_calls
        if calls:
            message["tool_calls"] = tool_calls(calls)
        logprobs = {"logprobs": chat_logprobs(answer.logprobs)} if answer.logprobs else {}
        return self._whole({"message": message, **logprobs}, answer, called=bool(calls))


class CompletionStream(_Stream):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, *, include_usage: bool = False, index: int = 0) -> None:
        super().__init__(model, include_usage=include_usage, index=index)
        self._offset = 0

    def feed(self, line: GenerateResponse) -> list[dict[str, Any]]:
        choice = {"text": line.response, "finish_reason": finish_reason(line), **self._logprobs(line)}
        entries = [*line.prompt_logprobs, *line.logprobs]
        self._offset += sum(len(entry.token) for entry in entries) or len(line.response)
        chunks = [self._chunk(choice, line)] if line.response or choice["logprobs"] or line.done else []
        return chunks + (self._usage_chunk(line) if line.done else [])

    def whole(self, answer: GenerateResponse) -> dict[str, Any]:
        return self._whole({"text": answer.response, **self._logprobs(answer)}, answer)

    def _logprobs(self, line: GenerateResponse) -> dict[str, Any]:
        entries = [*line.prompt_logprobs, *line.logprobs]
        if not entries:
            return {"logprobs": None}
        offset = self._offset
        if line.prompt_logprobs and line.done:  # a whole answer: a bos that its text does not show stands at 0 too
            offset = len(line.response) - sum(len(entry.token) for entry in entries)
        return {"logprobs": text_logprobs(entries, offset)}


def finish_reason(line: Reply, called: bool = False) -> str | None:
    if called and line.done_reason == "stop":
        return "tool_calls"
    return _FINISH.get(line.done_reason, line.done_reason) or None


def tool_calls(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """Arguments are JSON text here; the index counts an answer's calls."""
    return [
        {
            "index": call.function.index or 0,
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": msgspec.json.encode(call.function.arguments).decode()},
        }
        for call in calls
    ]


def usage(line: Reply) -> dict[str, Any]:
    prompt, completion = line.prompt_eval_count, line.eval_count
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": line.prompt_eval_cached_count},
    }


def chat_logprobs(entries: Iterable[Logprob]) -> dict[str, Any]:
    def entry(one: Any) -> dict[str, Any]:
        return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes}

    return {"content": [{**entry(e), "top_logprobs": [entry(top) for top in e.top_logprobs]} for e in entries]}


def text_logprobs(entries: Sequence[Logprob], offset: int) -> dict[str, Any]:
    """The parallel lists of /v1/completions; `offset` is where the first token's text begins in the whole text."""
    offsets = []
    for entry in entries:
        offsets.append(max(offset, 0))
        offset += len(entry.token)
    return {
        "tokens": [_name(entry) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_likeliest(entry) for entry in entries],
        "text_offset": offsets,
    }


def _likeliest(entry: Logprob) -> dict[str, float | None] | None:
    """By text; the token itself is among them even where it is not one of the likeliest. None where nothing is known."""
    if entry.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for one in (*entry.top_logprobs, entry):
        found.setdefault(_name(one), one.logprob)
    return found


def _name(entry: TokenLogprob) -> str:
    """A token's text, or its bytes where they are only part of a character's: different tokens must not become one key."""
    raw = bytes(entry.bytes)
    return entry.token if entry.token.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Choices:
    """Several answers in one response: the chunks of each, and their sum of tokens. A prompt's `n` choices count it once, as
    the one that computed it found it: the others share its blocks."""

    def __init__(self, forms: Sequence[Any], n: int) -> None:
        self._forms, self._n, self._left = forms, n, len(forms)
        self._used = [0, 0]
        self._cached: dict[int, int] = {}  # tokens of each prompt
        self._first = forms[0]
        self._include_usage = self._first.include_usage
        for form in forms:
            form.id, form.created = self._first.id, self._first.created

    def feed(self, told: tuple[int, Any]) -> list[dict[str, Any]]:
        """Chunks of a line of one answer; usage comes once, after all have ended."""
        index, line = told
        chunks = [chunk for chunk in self._forms[index].feed(line) if chunk["choices"]]
        if line.done:
            self._count(index, line)
            self._left -= 1
            if not self._left and self._include_usage:
                chunks.append(self._first._object(self._first.chunk_kind, [], usage=self._usage()))
        return chunks

    def whole(self, answers: Sequence[Any]) -> dict[str, Any]:
        made = []
        for index, (form, answer) in enumerate(zip(self._forms, answers, strict=True)):
            made.append(form.whole(answer))
            self._count(index, answer)
        return {**made[0], "choices": [choice for one in made for choice in one["choices"]], "usage": self._usage()}

    def _count(self, index: int, line: Reply) -> None:
        self._used[0] += line.prompt_eval_count if index % self._n == 0 else 0
        self._used[1] += line.eval_count
        prompt = index // self._n
        self._cached[prompt] = min(self._cached.get(prompt, line.prompt_eval_count), line.prompt_eval_cached_count)

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._used
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**counts, "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())}}


def embeddings(answer: EmbedResponse, *, as_base64: bool) -> dict[str, Any]:
    """Base64 is of little-endian float32."""

    def written(vector: list[float]) -> list[float] | str:
        return base64.b64encode(array("f", vector).tobytes()).decode() if as_base64 else vector

    data = [{"object": "embedding", "embedding": written(v), "index": i} for i, v in enumerate(answer.embeddings)]
    tokens = answer.prompt_eval_count
    return {"object": "list", "data": data, "model": answer.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def model(id: str, created: int, owner: str) -> dict[str, Any]:
    """`created` is in seconds since 1970."""
    return {"id": id, "object": "model", "created": created, "owned_by": owner}
