"""The engine on SmolLM2: many requests at once, each with exactly the tokens that it gives alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from ollamapy import ops
from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Embedding, Finish, Output, Plan, SamplingParams, Step, TokenLogprob
from ollamapy.gguf.reader import GGUFFile
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from ollamapy.tokenizer import Tokenizer
from tests.engine.device import Emulated
from tests.engine.test_speculation import Free

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "smollm2-135m.json").read_text())
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived",
    "1, 1, 2, 3, 5, 8,",
    "Water boils at",
    "A recipe for bread: take flour, water, salt and yeast. First,",
    "x",
    "The quick brown fox " * 12,
]


TIGHT = {"reference": {"block_size": 2, "num_blocks": 70}, "csrc": {"block_size": 16, "num_blocks": 7}}


@pytest.fixture(scope="module", params=["reference", "csrc"])
def kernels(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(smollm2_path: Path, kernels: str) -> Decoder:
    torch.set_num_threads(1)  # beside other processes on few cores, threads that wait for each other cost more than they give
    with GGUFFile.open(smollm2_path) as file:
        return load_model(file, torch.device("cpu"), kernels=kernels)


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    with GGUFFile.open(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    return [tokenizer.encode(text) for text in PROMPTS]


def make_engine(model: Decoder, device: Accelerator | None = None, **plan: object) -> Engine:
    # Unpaced: or what a step takes on this machine would decide what is in the next, and whether anything is preempted.
    settings: dict[str, object] = {"num_blocks": 200, "block_size": 16, "context_length": 512, "slowdown": 0.0, **plan}
    return Engine(model, Plan("smollm2", **settings), ops.chosen(), accelerator=device)  # type: ignore[arg-type]


def run(engine: Engine, requests: dict[int, tuple[list[int], SamplingParams]]) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {i: [] for i in requests}
    for i, (token_ids, params) in requests.items():
        engine.add(i, token_ids, params)
        if i % 3 == 0:
            take(engine, outputs)
    while engine.has_work:
        take(engine, outputs)
    assert engine.check_integrity() == "ok" and engine.stats().used_blocks == 0
    return outputs


def take(engine: Engine, outputs: dict[int, list[Output]]) -> None:
    for event in engine.step():
        assert isinstance(event, Step)
        for output in event.outputs:
            outputs[output.request_id].append(output)


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def finish_of(outputs: list[Output]) -> Finish:
    assert outputs[-1].finish is not None
    return outputs[-1].finish


def params_of(i: int, max_tokens: int) -> SamplingParams:
    if i % 2:
        return SamplingParams(seed=i, temperature=1.0, top_k=[40, 0][i // 2 % 2], max_tokens=max_tokens, logprobs=1)
    return SamplingParams(temperature=0.0, repeat_penalty=[1.0, 1.1][i // 2 % 2], max_tokens=max_tokens)


def check_together(model: Decoder, kernels: str, prompts: list[list[int]], max_tokens: int, compared: range) -> None:
    """32 requests with enough blocks, and with so few that sequences are preempted; those `compared` are run alone too."""
    requests = {i: (prompts[i % 8], params_of(i, max_tokens)) for i in range(32)}
    roomy = make_engine(model)
    tight = make_engine(model, max_num_seqs=16, max_batch_tokens=96, **TIGHT[kernels])
    found, pressed = run(roomy, requests), run(tight, requests)
    assert tight.stats().num_preemptions > 0 == roomy.stats().num_preemptions
    for i in requests:
        assert tokens_of(found[i]) == tokens_of(pressed[i]) and len(tokens_of(found[i])) == max_tokens, f"request {i}"
    solo = make_engine(model, max_num_seqs=1, prefix_cache=False)
    for i in compared:
        expected = run(solo, {i: requests[i]})[i]
        assert tokens_of(found[i]) == tokens_of(expected), f"request {i}"
        assert finish_of(found[i]).reason == finish_of(expected).reason == "length"
        assert [o.logprobs for o in found[i]] == [o.logprobs for o in expected]


def test_32_together_are_32_alone(model: Decoder, kernels: str, prompts: list[list[int]]) -> None:
    check_together(model, kernels, prompts, max_tokens={"reference": 5, "csrc": 24}[kernels], compared=range(0, 32, 3))


@pytest.mark.slow
def test_32_together_are_32_alone_at_length(model: Decoder, kernels: str, prompts: list[list[int]]) -> None:
    check_together(model, kernels, prompts, max_tokens=40, compared=range(32))


def test_recorded_steps_that_overlap_give_the_same_answers(model: Decoder, kernels: str, prompts: list[list[int]]) -> None:
    """What a GPU's engine does beside kernels, by an emulated device: padded buckets, tokens fed from step to step."""
    if kernels == "reference":
        pytest.skip("torch's matmul gives rows other bits when there are more of them, and its attention cannot be recorded")
    requests = {i: (prompts[i % 8], params_of(i, 12 + i)) for i in range(13)}
    requests |= {i: (prompts[i % 8], SamplingParams(temperature=0.0, max_tokens=40)) for i in range(13, 16)}
    engine = make_engine(model, Emulated())
    found, expected = run(engine, requests), run(make_engine(model), requests)
    for i in requests:
        assert tokens_of(found[i]) == tokens_of(expected[i]), f"request {i}"
    stats = engine.stats()
    assert stats.num_ahead > 10 and int(stats.graphs["replayed"]) > 10 and "16 x 32" in str(stats.graphs["steps"])


def test_golden_greedy_continuations(model: Decoder, kernels: str) -> None:
    """Equal to exact float32 results up to the first step where the two best tokens are closer than the kernels are exact."""
    least = {"reference": 0.01, "csrc": 1.0}[kernels]  # int8 activations move a logit by some tenths
    cases = GOLDEN["greedy"]
    requests = {i: (case["prompt_ids"], SamplingParams(temperature=0.0, max_tokens=16)) for i, case in enumerate(cases)}
    found = run(make_engine(model, kv_dtype="f32"), requests)
    for i, case in enumerate(cases):
        sure = next((n for n, margin in enumerate(case["margins"]) if margin < least), 16)
        assert tokens_of(found[i])[:sure] == case["ids"][:16][:sure] and (sure > 4 or kernels == "csrc")


def test_prompt_logprobs_are_the_golden_ones(model: Decoder, kernels: str) -> None:
    """0.5 sum(p * difference^2) of the likeliest tokens is the KL divergence to second order: its bound is that of the golden
    tests, llama.cpp's own for int8 activations."""
    with np.load(Path(__file__).parent.parent / "data" / "smollm2-135m.npz") as data:
        ids, top, exact = data["ids"][:300].tolist(), data["top_ids"], data["top_logprobs"].astype(np.float64)
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=64)
    outputs = run(make_engine(model, kv_dtype="f32", max_batch_tokens=128), {0: (ids, params)})[0]
    entries = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in entries] == ids[1:]
    distances = []
    for position, entry in enumerate(entries):
        golden = dict(zip(top[position].tolist(), exact[position].tolist(), strict=True))
        shared = [(golden[token], value) for token, value in (*entry.top, (entry.token_id, entry.logprob)) if token in golden]
        distances.append(0.5 * sum(math.exp(wanted) * (wanted - value) ** 2 for wanted, value in shared))
    bound = {"reference": 1e-6, "csrc": GOLDEN["llama.cpp"]["mean_kl"]}[kernels]
    assert np.mean(distances) <= bound


def test_logprobs(model: Decoder, prompts: list[list[int]]) -> None:
    found = run(make_engine(model), {0: (prompts[0], SamplingParams(temperature=0.0, max_tokens=4, logprobs=5))})[0]
    logprobs: list[TokenLogprob] = [each for output in found for each in output.logprobs]
    assert len(logprobs) == 4
    for each, token in zip(logprobs, tokens_of(found), strict=True):
        values = [value for _, value in each.top]
        assert len(each.top) == 5 and values == sorted(values, reverse=True)
        assert each.top[0] == (token, pytest.approx(each.logprob)) and each.token_id == token
        assert each.logprob <= 0.0 and sum(math.exp(value) for value in values) <= 1.0 + 1e-6


def test_prefix_reuse_and_shift(model: Decoder, prompts: list[list[int]]) -> None:
    engine = make_engine(model, context_length=64)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    first = run(engine, {0: (prompts[7], params)})[0]
    again = run(engine, {1: (prompts[7], params)})[1]
    assert finish_of(first).num_shifts == finish_of(again).num_shifts > 0
    assert finish_of(again).cached_tokens >= 16 > finish_of(first).cached_tokens == 0
    assert tokens_of(first) == tokens_of(again) and len(tokens_of(first)) == 20


def test_embeddings_beside_chats(model: Decoder, prompts: list[list[int]]) -> None:
    vectors: dict[int, bytes] = {}
    for budget in (512, 40):
        engine = make_engine(model, max_batch_tokens=budget, max_num_seqs=8)
        engine.add(100, prompts[2], SamplingParams(temperature=0.0, max_tokens=5))
        for i, prompt in enumerate(prompts):
            engine.embed(i, prompt)
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Embedding):
                    assert (
                        not event.error and len(event.vector) == 576 * 4 and event.num_tokens == len(prompts[event.request_id])
                    )
                    assert vectors.setdefault(event.request_id, event.vector) == event.vector, "the same by chunks"
    assert len(set(vectors.values())) == len(prompts)


REPEATING = [
    "Copy: red, green, blue, white, black. Copy: red, green, blue, white, black. Copy:",
    '{"name": "Ada", "age": 36}\n{"name": "Bob", "age": 41}\n{"name": "Ada", "age": 36}\n{"name":',
    "for i in range(10):\n    print(i)\nfor j in range(10):\n    print(j)\nfor k in range(10):\n",
    "1 2 3 4 5 6 7 8 9 10 1 2 3 4 5",
]


def test_guesses_change_no_answer(model: Decoder, kernels: str, prompts: list[list[int]], smollm2_path: Path) -> None:
    """Greedy and sampled, with and without guesses in one batch: each has the tokens that it has where nothing is guessed."""
    if kernels == "reference":
        pytest.skip("torch's matmul gives rows other bits when there are more of them")
    with GGUFFile.open(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    texts = [tokenizer.encode(text) for text in REPEATING] + prompts[:4]
    requests = {i: (texts[i % 8], params_of(i // 2, 60)) for i in range(16)}
    expected = run(make_engine(model, num_blocks=400), requests)
    guessed = {
        i: (ids, msgspec.structs.replace(params, speculation=["ngram", "auto", "off"][i % 3]))
        for i, (ids, params) in requests.items()
    }
    engine = make_engine(model, num_blocks=400)
    engine.speculation.cost = Free()
    found = run(engine, guessed)
    stats = engine.stats()
    assert stats.num_accepted_tokens > 100 and stats.num_draft_tokens > stats.num_accepted_tokens
    for i in requests:
        assert tokens_of(found[i]) == tokens_of(expected[i]), f"request {i}"
        assert [entry for o in found[i] for entry in o.logprobs] == [entry for o in expected[i] for entry in o.logprobs]


@pytest.mark.slow  # 3200 tokens of each model, half of them one by one
@pytest.mark.parametrize("name", ["smollm2_path", "gemma3_path"])
def test_speculation_changes_no_greedy_token(name: str, request: pytest.FixtureRequest) -> None:
    """With the real cost of rows and with every guess verified, alone and in a batch of eight."""
    path = request.getfixturevalue(name)
    with GGUFFile.open(path) as file:
        decoder = load_model(file, torch.device("cpu"))
        tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = [tokenizer.encode(text) for text in PROMPTS]
    found: dict[str, dict[int, list[int]]] = {}
    accepted = 0
    for case in ("off", "priced", "free", "alone"):
        params = SamplingParams(temperature=0.0, max_tokens=200, speculation="off" if case == "off" else "ngram")
        groups = (
            [{i: (own, params)} for i, own in enumerate(ids)]
            if case == "alone"
            else [{i: (own, params) for i, own in enumerate(ids)}]
        )
        engine = make_engine(decoder)
        if case in ("free", "alone"):
            engine.speculation.cost = Free()
        outputs = {i: own for group in groups for i, own in run(engine, group).items()}
        found[case] = {i: [token for output in own for token in output.token_ids] for i, own in outputs.items()}
        accepted += engine.stats().num_accepted_tokens
    assert accepted > 500
    assert found["priced"] == found["free"] == found["alone"] == found["off"]
