"""A model whose answer depends on everything it can see: a hash of the sequence's tokens, read back through the paged cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ollamapy import reference
from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import (
    NOBODY,
    Caller,
    Embedding,
    Finish,
    LayerGroup,
    Output,
    Plan,
    SamplingParams,
    Step,
    TokenLogprob,
)

VOCAB = 97
HIDDEN = 4
WINDOW = 6  # of the second layer, when it is in a group of its own
GROUPS = (LayerGroup(0, (0,)), LayerGroup(WINDOW, (1,)))
RAISES, NOT_A_NUMBER, BREAKS_LOGITS = 90, 91, 92  # prompts with these tokens fail in forward, in sampling, in logits


@dataclass(frozen=True)
class FakeConfig:
    architecture: str = "fake"
    embedding_length: int = HIDDEN
    vocab_size: int = VOCAB
    causal: bool = True
    pooling_type: str = "last"


@dataclass
class FakeModel:
    """Hidden state of position p: a hash of tokens 0..p, 64 bits as four exact floats. The second layer checks the first."""

    config: FakeConfig = field(default_factory=FakeConfig)
    weight_bytes: int = 1000
    vram_bytes: int = 0
    num_forwards: int = 0
    fail_forwards: int = 0  # so many of the next passes over more than one sequence fail
    broken: bool = False  # every pass fails
    memory: int = 0  # the next token depends on so many last ones alone, so that answers repeat themselves; 0: on all
    batch_sizes: list[tuple[int, int]] = field(default_factory=list)  # sequences, tokens

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        self.tables = rng.normal(size=(2, 1024, VOCAB)).astype(np.float32) * 2
        self.tables[:, :, RAISES : BREAKS_LOGITS + 1] = -100.0  # never generated

    def new_caches(
        self,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        groups: Sequence[LayerGroup] = (),
    ) -> list[KVCache]:
        """In groups, both layers use one tensor, so that a block given to both is seen."""
        states = [LayerState(1, 2, 2), LayerState(1, 2, 2, window=WINDOW)]
        first, second = (reference.new_cache(state, num_blocks, block_size, dtype, torch.device("cpu")) for state in states)
        return [first, KVCache(first.value, first.key, group=1) if groups else second]

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        self.num_forwards += 1
        self.batch_sizes.append((batch.num_seqs, batch.num_tokens))
        self._check(batch)
        first, second = caches
        first.key.view(-1, 2)[batch.slot_mapping] = torch.stack((batch.token_ids, batch.positions), 1).float()
        slots = batch.groups[second.group].slot_mapping
        second.value.view(-1, 2)[slots] = torch.stack((batch.positions, batch.token_ids), 1).float()
        if self.broken or (self.fail_forwards and batch.num_seqs > 1):
            self.fail_forwards = max(self.fail_forwards - 1, 0)
            raise RuntimeError("kernel failed at /some/path.cpp:12")
        if RAISES in batch.token_ids.tolist():
            raise RuntimeError("this token cannot be")
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        hidden = torch.empty(len(batch.logit_rows), HIDDEN)
        seen: dict[int, list[int]] = {}
        for out, row in enumerate(batch.logit_rows.tolist()):
            s = next(s for s in range(batch.num_seqs) if starts[s] <= row < starts[s + 1])
            if s not in seen:
                seen[s] = self._read(batch, caches, s)
            position = lengths[s] - batch.query_lens[s] + row - starts[s]
            visible = seen[s][: position + 1] if self.config.causal else seen[s]
            known = visible[-self.memory :] if self.memory else [position % 256, *visible]
            digest = hashlib.blake2b(bytes(known), digest_size=8).digest()
            hidden[out] = torch.from_numpy(np.frombuffer(digest, np.uint16).astype(np.float32))
            if NOT_A_NUMBER in visible:
                hidden[out] = torch.nan
            if BREAKS_LOGITS in visible:
                hidden[out] = -1.0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if (hidden == -1.0).any():
            raise RuntimeError("no logits")
        values = hidden.nan_to_num(0.0).numpy().astype(np.int64)
        out = self.tables[0, values[:, 0] % 1024] + self.tables[1, (values[:, 1] ^ values[:, 2] ^ values[:, 3]) % 1024]
        logits = torch.from_numpy(out)
        logits[hidden[:, 0].isnan()] = torch.nan
        return logits

    @staticmethod
    def _check(batch: Batch) -> None:
        """What batch.py promises."""
        assert batch.query_start.tolist() == [0, *np.cumsum(batch.query_lens).tolist()]
        assert all(own <= bound for own, bound in zip(batch.seq_lens.tolist(), batch.context_lens, strict=True))
        assert batch.num_tokens == sum(batch.query_lens) == len(batch.positions) == len(batch.slot_mapping)
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens, "two tokens were given one slot"
        assert batch.block_table.shape[0] == batch.num_seqs
        for name in ("token_ids", "positions", "slot_mapping", "logit_rows"):
            assert getattr(batch, name).dtype == torch.int64
        for name in ("block_table", "query_start", "seq_lens"):
            assert getattr(batch, name).dtype == torch.int32 and getattr(batch, name).is_contiguous()

    @staticmethod
    def _read(batch: Batch, caches: Sequence[KVCache], s: int) -> list[int]:
        """The tokens of a sequence as both layers remember them; their positions must be 0, 1, 2 ..."""
        blocks, length = batch.block_table[s].long(), int(batch.seq_lens[s])
        keys = caches[0].key[blocks].view(-1, 2)[:length]
        blocks = batch.groups[caches[1].group].block_table[s].long()
        values = caches[1].value[blocks].view(-1, 2)[:length]
        # A windowed layer remembers what the first of the step's tokens sees, and what comes after it.
        seen = max(length - batch.query_lens[s] - WINDOW + 1, 0) if caches[1].group else 0
        assert torch.equal(keys[seen:], values.flip(1)[seen:]), "the caches of two layers disagree"
        assert torch.equal(keys[:, 1], torch.arange(length).float()), "a slot holds another position"
        return [int(token) for token in keys[:, 0].tolist()]


@dataclass
class Answer:
    """All that an engine said about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    num_shifts: int = 0  # told on the way
    embedding: Embedding | None = None


class Run:
    """An engine whose books are checked after each step, and its answers by request id."""

    def __init__(
        self,
        model: FakeModel | None = None,
        draft: FakeModel | None = None,
        device: Accelerator | None = None,
        **plan: object,
    ) -> None:
        settings: dict[str, object] = {"kv_dtype": "f32", "block_size": 4, "num_blocks": 64, "context_length": 128}
        settings |= {"slowdown": 0.0, **plan}  # or what a step takes would decide what is in the next
        settings["device"] = str(device.devices[0]) if device is not None else "cpu"
        self.model = model or FakeModel()
        made = Plan("fake.gguf", **settings)  # type: ignore[arg-type]
        self.engine = Engine(self.model, made, draft_model=draft, accelerator=device)
        self.answers: dict[int, Answer] = {}

    def add(self, request_id: int, token_ids: list[int], caller: Caller = NOBODY, **params: object) -> None:
        self.answers[request_id] = Answer()
        sampling = SamplingParams(**{"temperature": 0.0, **params})  # type: ignore[arg-type]
        self.engine.add(request_id, token_ids, sampling, caller)

    def embed(self, request_id: int, token_ids: list[int]) -> None:
        self.answers[request_id] = Answer()
        self.engine.embed(request_id, token_ids)

    def step(self) -> None:
        for event in self.engine.step():
            if isinstance(event, Step):
                for output in event.outputs:
                    self._take(output)
            else:
                assert isinstance(event, Embedding)
                assert self.answers[event.request_id].embedding is None
                self.answers[event.request_id].embedding = event
        assert self.engine.check_integrity() == "ok"

    def _take(self, output: Output) -> None:
        answer = self.answers[output.request_id]
        assert answer.finish is None, "something came after the end"
        answer.tokens += output.token_ids
        answer.logprobs += output.logprobs
        answer.prompt_logprobs += output.prompt_logprobs
        answer.finish = output.finish
        answer.num_shifts = max(answer.num_shifts, output.num_shifts)

    def drain(self, most: int = 100_000) -> dict[int, Answer]:
        start = time.monotonic()
        while self.engine.has_work:
            self.step()
            most -= 1
            assert most and time.monotonic() - start < 60, "the engine does not come to an end"
        stats = self.engine.stats()
        assert stats.used_blocks == 0 and stats.free_blocks + stats.cached_blocks == stats.total_blocks
        assert stats.integrity == "ok"
        return self.answers

    def one(self, token_ids: list[int], **params: object) -> Answer:
        request_id = len(self.answers)
        self.add(request_id, token_ids, **params)
        return self.drain()[request_id]


def alone(
    token_ids: list[int], model: FakeModel | None = None, plan: dict[str, object] | None = None, **params: object
) -> Answer:
    """The answer in an engine that does nothing else, has all the memory it wants, and reuses nothing."""
    settings: dict[str, object] = {"num_blocks": 256, "max_num_seqs": 1, "prefix_cache": False, "max_batch_tokens": 4096}
    return Run(model, **{**settings, **(plan or {})}).one(token_ids, **params)
