"""A daemon whose engines only count: the real server, pipe and loop around a model that costs nothing. No torch.

`python bench/fake_engine.py serve` is `ollamapy serve` with such engines. Each request's tokens spell TEXT over and over;
its option `seed` is the pace in steps per second, on a grid of CLOCK_MONOTONIC, 0 as fast as it goes. A prompt with
words of TEXT in it is answered from the last of them on.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import socket

from ollamapy import env
from ollamapy.engine.protocol import Caller, Embedding, EngineInfo, Event, Finish, Output, Plan, SamplingParams, Stats, Step
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle import forkserver
from ollamapy.lifecycle.loop import Loop
from ollamapy.lifecycle.residents import Residents
from ollamapy.lifecycle.spawner import Spawner
from ollamapy.server.main import run
from ollamapy.server.start import set_up_logging

NUM_WORDS = 1000
FIRST_BYTE = 3
FIRST_WORD = 259  # token id: <unk>, <s>, </s> and the bytes come before
CONTEXT = 8192
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"


def text(num_tokens: int, first: int = 0) -> str:
    """What a request of so many tokens answers, from TEXT's word `first` on."""
    return "".join(f" w{n % NUM_WORDS:03}" for n in range(first, first + num_tokens))


def write_model(path: Path) -> None:
    """A GGUF file with a header that the daemon believes and hardly any weights."""
    words = [f"▁w{n:03}" for n in range(NUM_WORDS)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    llama = {"context_length": CONTEXT, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}
    llama |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": value for key, value in llama.items()},
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * NUM_WORDS,
        "tokenizer.chat_template": TEMPLATE,
    }
    write_gguf(path, metadata, [("token_embd.weight", GGMLType.F32, (len(tokens), 64), bytes(4 * len(tokens) * 64))])


class Counter:
    """An engine without a model."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._running: dict[int, tuple[int, int]] = {}  # request -> prompt tokens, most tokens
        self._done: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._pace = 0
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add(self, request_id: int, token_ids: list[int], params: SamplingParams, caller: Caller) -> None:
        self._pace = max(0, params.seed)
        self._running[request_id] = (len(token_ids), params.max_tokens)
        self._done[request_id] = 0
        spelled = re.findall(rb"w(\d{3})", bytes(id - FIRST_BYTE for id in token_ids if FIRST_BYTE <= id < FIRST_WORD))
        self._first[request_id] = int(spelled[-1]) if spelled else 0

    def embed(self, request_id: int, token_ids: list[int], caller: Caller) -> None:
        raise ValueError("it does not embed")

    def abort(self, request_id: int) -> None:
        for held in (self._running, self._done, self._first):
            held.pop(request_id, None)

    def step(self) -> list[Event]:
        if self._pace:
            interval = 1 / self._pace
            time.sleep(interval - time.monotonic() % interval)
        self._steps += 1
        outputs = []
        for request_id, (prompt, most) in list(self._running.items()):
            token = FIRST_WORD + (self._first[request_id] + self._done[request_id]) % NUM_WORDS
            self._done[request_id] += 1
            finish = None
            if self._done[request_id] == most:
                del self._running[request_id], self._done[request_id], self._first[request_id]
                finish = Finish("length", prompt, completion_tokens=most, queue_ns=1000, prompt_ns=1000, decode_ns=1000)
            outputs.append(Output(request_id, [token], finish=finish))
        return [Step(outputs)] if outputs else list[Embedding]()

    def stats(self) -> Stats:
        return Stats(len(self._running), 0, 10, 0, 0, 10, 0, 0, 0, self._steps)

    def info(self) -> EngineInfo:
        plan = self._plan
        return EngineInfo("llama", plan.device, plan.context_length, plan.num_blocks, plan.block_size, 1000, 500, 0, 64)


def engine_main(sock: socket.socket, plan: Plan) -> None:
    Loop(sock, plan, lambda plan, progress: Counter(plan)).run()


def serve() -> int:
    settings = env.load()
    set_up_logging(settings)
    return run(settings, Residents(settings, spawner=Spawner((sys.executable, str(Path(__file__).resolve())))))


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        sys.exit(serve())
    forkserver.run(lambda: (engine_main, ("cpu",)), sys.argv[1:])
