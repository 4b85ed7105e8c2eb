"""The engine on a fake model: what each request is promised, one promise at a time."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.protocol import SamplingParams
from ollamapy.errors import EngineError
from tests.engine.fake import BREAKS_LOGITS, NOT_A_NUMBER, RAISES, FakeConfig, FakeModel, Run, alone

PROMPT = [5, 3, 8, 1, 9, 2, 7]


def finish_of(answer: object) -> str:
    finish = getattr(answer, "finish", None)
    assert finish is not None
    return str(finish.reason)


def test_greedy_generation_ends_at_max_tokens() -> None:
    answer = Run().one(PROMPT, max_tokens=20)
    assert len(answer.tokens) == 20 and finish_of(answer) == "length"
    assert answer.finish is not None
    assert (answer.finish.prompt_tokens, answer.finish.completion_tokens, answer.finish.cached_tokens) == (7, 20, 0)
    assert answer.finish.prompt_ns > 0 and answer.finish.decode_ns > 0 and answer.finish.queue_ns > 0
    longer = Run().one(PROMPT + answer.tokens[:8], max_tokens=12)  # a greedy continuation is the same from any of its points
    assert longer.tokens == answer.tokens[8:]


def test_zero_tokens_computes_the_prompt_only() -> None:
    run = Run()
    answer = run.one(PROMPT * 3, max_tokens=0)
    assert answer.tokens == [] and finish_of(answer) == "length" and run.model.num_forwards == 1
    again = run.one(PROMPT * 3, max_tokens=1)
    assert again.finish is not None and again.finish.cached_tokens == 20


def test_stop_id_is_counted_but_not_reported() -> None:
    tokens = Run().one(PROMPT, max_tokens=20).tokens
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    cut = tokens.index(stop)
    answer = Run().one(PROMPT, max_tokens=20, stop_ids=(96, stop), logprobs=0)
    assert answer.tokens == tokens[:cut] and finish_of(answer) == "stop"
    assert answer.finish is not None and answer.finish.completion_tokens == cut + 1
    assert len(answer.logprobs) == cut


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_chunks_and_blocks_do_not_show(budget: int, block_size: int) -> None:
    expected = alone(PROMPT * 5, max_tokens=10).tokens
    run = Run(block_size=block_size, max_batch_tokens=budget, max_num_seqs=1, num_blocks=256 // block_size)
    assert run.one(PROMPT * 5, max_tokens=10).tokens == expected
    assert max(tokens for _, tokens in run.model.batch_sizes) <= budget


def test_decode_goes_on_beside_a_long_prefill() -> None:
    run = Run(max_batch_tokens=8, max_num_seqs=4)
    run.add(0, [1, 2, 3], max_tokens=50)
    run.step()
    run.add(1, PROMPT * 6, max_tokens=2)
    before = len(run.answers[0].tokens)
    for _ in range(5):
        run.step()
    assert len(run.answers[0].tokens) == before + 5, "each step decodes"
    assert run.model.batch_sizes[1:6] == [(2, 8)] * 5, "and fills its budget with the prompt"


def test_prefix_is_reused_across_requests() -> None:
    run = Run()
    first = run.one(PROMPT * 4, max_tokens=9)
    assert first.finish is not None and first.finish.cached_tokens == 0
    same = run.one(PROMPT * 4, max_tokens=9)
    assert same.tokens == first.tokens
    assert same.finish is not None and same.finish.cached_tokens == 24  # of 28: the last token is always computed
    turn = run.one(PROMPT * 4 + first.tokens + [11], max_tokens=3)  # a chat's next turn, its own answer included
    assert turn.finish is not None and turn.finish.cached_tokens == 36
    assert turn.tokens == alone(PROMPT * 4 + first.tokens + [11], max_tokens=3).tokens
    stats = run.engine.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens) == (60, 28 + 28 + 38)


def test_prefix_cache_can_be_off() -> None:
    run = Run(prefix_cache=False)
    for _ in range(2):
        answer = run.one(PROMPT * 4, max_tokens=3)
        assert answer.finish is not None and answer.finish.cached_tokens == 0
    assert run.engine.stats().cached_blocks == 0


def test_prefix_shared_while_in_use() -> None:
    run = Run()
    run.add(0, PROMPT * 4, max_tokens=30)
    run.step()
    run.add(1, PROMPT * 4, max_tokens=30)
    run.step()
    assert run.engine.stats().used_blocks == 7 + 2  # 6 blocks shared, the rest each its own
    answers = run.drain()
    assert answers[0].tokens == answers[1].tokens == alone(PROMPT * 4, max_tokens=30).tokens


def test_context_full_without_shift_ends_with_length() -> None:
    answer = Run(context_length=16).one(PROMPT, shift=False)
    assert finish_of(answer) == "length" and len(answer.tokens) == 16 - 7
    full = Run(context_length=16).one((PROMPT * 3)[:16], shift=False)
    assert finish_of(full) == "length" and len(full.tokens) == 1


@pytest.mark.parametrize("num_keep", [0, 1, 4, 5, -1, 1000])
def test_context_shift_keeps_the_head_and_half_of_the_rest(num_keep: int) -> None:
    context, total = 16, 40
    answer = Run(context_length=context).one(PROMPT, max_tokens=total, num_keep=num_keep)
    tokens, expected, shifts = list(PROMPT), [], 0
    keep = min(len(PROMPT) if num_keep < 0 else num_keep, context - 4)
    for _ in range(total):  # the rule again, in the plainest way
        (token,) = alone(tokens, plan={"context_length": context + 1}, max_tokens=1).tokens
        tokens.append(token)
        expected.append(token)
        if len(tokens) == context and len(expected) < total:
            dropped = (len(tokens) - 1 - keep) // 2
            tokens, shifts = tokens[:keep] + tokens[keep + dropped :], shifts + 1
    assert answer.tokens == expected
    assert answer.finish is not None and answer.finish.num_shifts == answer.num_shifts == shifts > 1
    assert finish_of(answer) == "length"


@pytest.mark.parametrize("context_length", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("num_keep", [-1, 0, 4])
def test_tiny_contexts_end(context_length: int, num_keep: int) -> None:
    for prompt_length in range(1, context_length + 1):
        answer = Run(context_length=context_length).one(PROMPT[:prompt_length], num_keep=num_keep)
        assert len(answer.tokens) == 10 * context_length, "ten contexts is the limit of a request without one"


def test_a_request_may_ask_for_a_larger_context_up_to_what_the_blocks_hold() -> None:
    run = Run(context_length=16, max_context=100, num_blocks=10)
    assert run.engine.info().max_context == 40
    prompt = PROMPT * 3
    short = run.one(prompt)
    assert short.finish is not None and "16" in short.finish.error
    assert run.one(prompt, context_length=40, max_tokens=15).tokens == alone(prompt, max_tokens=15).tokens
    full = run.one(prompt, context_length=1000, shift=False)
    assert finish_of(full) == "length" and len(full.tokens) == 40 - 21


def test_request_may_ask_for_a_smaller_context_but_not_for_a_larger_one() -> None:
    assert len(Run(context_length=32).one(PROMPT, context_length=12, shift=False).tokens) == 5
    assert len(Run(context_length=32).one(PROMPT, context_length=1000, shift=False).tokens) == 25


def test_pool_smaller_than_the_context_is_the_context() -> None:
    run = Run(num_blocks=5, context_length=1000)
    assert len(run.one(PROMPT, shift=False).tokens) == 13
    refused = run.one(PROMPT * 3)
    assert refused.finish is not None and "21 tokens" in refused.finish.error and "20 tokens" in refused.finish.error


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {}, "no tokens"),
        ([1] * 129, {}, "129 tokens"),
        ([1, 97], {}, "0..96"),
        ([1, -1], {}, "0..96"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": float("inf")}, "top_p"),
        ([1], {"repeat_penalty": 0.0}, "repeat_penalty"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_reason(prompt: list[int], params: dict[str, object], text: str) -> None:
    run = Run()
    run.add(7, PROMPT, max_tokens=5)
    answer = run.one(prompt, **params)
    assert finish_of(answer) == "error" and answer.finish is not None and text in answer.finish.error
    assert answer.tokens == [] and len(run.answers[7].tokens) == 5


def test_id_in_use() -> None:
    run = Run()
    run.add(1, PROMPT)
    with pytest.raises(EngineError, match="request 1"):
        run.engine.add(1, PROMPT, SamplingParams())
    with pytest.raises(EngineError, match="request 1"):
        run.engine.embed(1, PROMPT)


def test_abort_in_every_phase() -> None:
    run = Run(max_num_seqs=2, max_batch_tokens=8)
    run.add(0, PROMPT, max_tokens=40)
    run.add(1, PROMPT * 5, max_tokens=40)  # in the middle of its prompt
    run.add(2, PROMPT * 2, max_tokens=40)  # waiting
    for _ in range(3):
        run.step()
    run.embed(3, PROMPT)
    for request_id in (0, 1, 2, 3):
        run.engine.abort(request_id)
        run.engine.abort(request_id)
        run.engine.abort(999)
    assert run.engine.stats().used_blocks == 0, "at once, not with the next step"
    answers = run.drain()
    assert [finish_of(answers[i]) for i in (0, 1, 2)] == ["abort"] * 3
    assert answers[3].embedding is not None and answers[3].embedding.error == "aborted"
    assert answers[2].finish is not None and answers[2].finish.completion_tokens == 0 and answers[2].finish.queue_ns > 0
    assert run.model.num_forwards == 3


def test_failing_prompt_ends_alone() -> None:
    run = Run()
    prompts = {i: [i + 1, *PROMPT] for i in range(6)}
    prompts[2] = [3, RAISES, 4]
    prompts[4] = [3, NOT_A_NUMBER, 4]
    prompts[5] = [3, BREAKS_LOGITS, 4]
    for request_id, prompt in prompts.items():
        run.add(request_id, prompt, max_tokens=12)
    answers = run.drain()
    for request_id in (0, 1, 3):
        assert answers[request_id].tokens == alone(prompts[request_id], max_tokens=12).tokens
    for request_id in (2, 4, 5):
        finish = answers[request_id].finish
        assert finish is not None and finish.reason == "error" and finish.error
        assert "/" not in finish.error and "cannot be" not in finish.error
    assert "not finite" in answers[4].finish.error  # type: ignore[union-attr]


def test_failed_step_is_run_again_one_by_one() -> None:
    run = Run(model=FakeModel(fail_forwards=1))
    for request_id in range(4):
        run.add(request_id, [request_id, *PROMPT], max_tokens=6)
    run.embed(9, PROMPT)
    run.step()
    assert run.model.num_forwards == 1 + 5
    answers = run.drain()
    for request_id in range(4):
        assert answers[request_id].tokens == alone([request_id, *PROMPT], max_tokens=6).tokens
    assert answers[9].embedding is not None and answers[9].embedding.error == ""


def test_broken_model_ends_each_request_once_and_serves_again() -> None:
    run = Run(model=FakeModel(broken=True))
    for request_id in range(3):
        run.add(request_id, [request_id, *PROMPT], max_tokens=6)
    run.embed(3, PROMPT)
    answers = run.drain()
    assert [finish_of(answers[i]) for i in range(3)] == ["error"] * 3
    assert answers[3].embedding is not None and answers[3].embedding.error
    assert run.engine.stats().cached_blocks == 0, "nothing that a failed pass wrote is reused"
    run.model.broken = False
    assert run.one(PROMPT, max_tokens=6).tokens == alone(PROMPT, max_tokens=6).tokens


@pytest.mark.parametrize("error", ["MemoryError", "RuntimeError"])  # Python's, torch's
def test_out_of_memory_in_a_step_makes_it_smaller(error: str) -> None:
    """A batch that memory does not hold is run again one by one; only what alone is too much ends."""

    class Small(FakeModel):
        def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
            if batch.num_tokens > 12:
                bytearray(1 << 62) if error == "MemoryError" else torch.empty(1 << 48)
            return super().forward(batch, caches)

    run = Run(model=Small())
    prompts = {0: PROMPT[:5], 1: PROMPT[1:7], 2: [3] * 40, 3: PROMPT[2:8]}
    for request_id, prompt in prompts.items():
        run.add(request_id, prompt, max_tokens=6)
    answers = run.drain()
    failed = answers[2].finish
    assert failed is not None and failed.reason == "error" and f"ran out of memory on this request ({error})" in failed.error
    for request_id in (0, 1, 3):
        assert answers[request_id].tokens == alone(prompts[request_id], max_tokens=6).tokens


def test_lost_device_ends_the_engine() -> None:
    class Lost(FakeModel):
        def forward(self, batch: object, caches: object) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    run = Run(model=Lost())
    run.add(0, PROMPT)
    with pytest.raises(EngineError, match="device cpu failed"):
        run.engine.step()


def test_seed_decides_and_position_does_too() -> None:
    sampled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 30}
    first = Run().one(PROMPT, seed=5, **sampled).tokens
    assert Run().one(PROMPT, seed=5, **sampled).tokens == first
    assert Run().one(PROMPT, seed=6, **sampled).tokens != first
    unseeded = Run()
    assert unseeded.one(PROMPT, **sampled).tokens != unseeded.one(PROMPT, **sampled).tokens


@pytest.mark.parametrize("pooling_type", ["mean", "cls", "last", "none", "rank"])
@pytest.mark.parametrize("causal", [True, False])
def test_embeddings_do_not_show_their_chunks(pooling_type: str, causal: bool) -> None:
    config = FakeConfig(pooling_type=pooling_type, causal=causal)
    prompts = {i: (PROMPT * 4)[: 1 + 5 * i] for i in range(6)}
    expected = {}
    for i, prompt in prompts.items():
        run = Run(FakeModel(config), max_batch_tokens=512)
        run.embed(0, prompt)
        expected[i] = run.drain()[0].embedding
    for budget in (1, 7, 512):
        run = Run(FakeModel(config), max_batch_tokens=budget, max_num_seqs=8 if budget > 1 else 1)
        for i, prompt in prompts.items():
            run.embed(i, prompt)
        for i, answer in run.drain().items():
            wanted, got = expected[i], answer.embedding
            assert wanted is not None and got is not None and got.error == ""
            assert got.num_tokens == len(prompts[i]) and len(got.vector) == 16
            assert struct.unpack("<4f", got.vector) == pytest.approx(struct.unpack("<4f", wanted.vector), rel=1e-6)
    assert len({each.vector for each in expected.values() if each}) == (1 if pooling_type == "cls" and causal else 6)


def test_whole_prompts_beside_each_other_and_over_the_budget() -> None:
    run = Run(FakeModel(FakeConfig(causal=False, pooling_type="mean")), max_batch_tokens=16, max_num_seqs=8)
    for i in range(5):
        run.embed(i, [i, *PROMPT])
    run.embed(5, PROMPT * 4)
    run.drain()
    assert run.model.batch_sizes == [(2, 16), (2, 16), (1, 8), (1, 28)]


def test_embedding_beside_generation() -> None:
    run = Run(FakeModel(FakeConfig(pooling_type="mean")), max_batch_tokens=16, max_num_seqs=4)
    run.add(0, PROMPT, max_tokens=20)
    run.embed(1, PROMPT * 5)
    run.add(2, PROMPT * 2, max_tokens=20)
    run.embed(3, [RAISES])
    run.embed(4, [NOT_A_NUMBER])
    answers = run.drain()
    for i, prompt in ((0, PROMPT), (2, PROMPT * 2)):
        assert answers[i].tokens == alone(prompt, max_tokens=20).tokens
    assert answers[1].embedding is not None and not answers[1].embedding.error
    for i in (3, 4):
        assert answers[i].embedding is not None and answers[i].embedding.error and answers[i].embedding.vector == b""


def test_info_and_stats() -> None:
    run = Run(num_blocks=10)
    info = run.engine.info()
    assert info.kv_bytes == 10 * 4 * (2 + 2 + 2 + 2) * 4 and info.vram_bytes == 0 and info.weight_bytes == 1000
    run.add(0, PROMPT, max_tokens=5)
    run.add(1, PROMPT[::-1], max_tokens=5)
    stats = run.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps, stats.free_blocks) == (0, 2, 0, 10)
    run.step()
    stats = run.engine.stats()
    assert (stats.num_running, stats.num_steps, stats.used_blocks, stats.total_blocks) == (2, 1, 4, 10)


def test_no_memory_for_the_cache_is_said() -> None:
    with pytest.raises(EngineError, match="KV cache of 4000000000000"):
        Run(num_blocks=10**12)
