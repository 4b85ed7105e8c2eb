"""The engine on gemma3, whose layers have windows: prefix hits, chunks and preemption change no bit of an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ollamapy.engine.groups import layer_groups
from ollamapy.engine.protocol import Output, SamplingParams
from ollamapy.gguf.reader import GGUFFile
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from ollamapy.tokenizer import Tokenizer
from tests.engine.test_real_model import finish_of, make_engine, run, tokens_of

CONTEXT = 1024
HEAD = 560  # tokens that half of the prompts share: beyond the window of 512
MAX_TOKENS = 100
SEQUENCES = 8


@pytest.fixture(scope="module")
def model(gemma3_path: Path) -> Decoder:
    with GGUFFile.open(gemma3_path) as file:
        return load_model(file, torch.device("cpu"), kernels="csrc")


@pytest.fixture(scope="module")
def prompts(gemma3_path: Path) -> list[list[int]]:
    """Of 580 tokens with one head, and of a few to 180 tokens."""
    with GGUFFile.open(gemma3_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    head = tokenizer.encode(" ".join(f"Item {number} costs {number * 37 % 101} coins." for number in range(120)))[:HEAD]
    tails = [tokenizer.encode(f"Question {number}: what is the most expensive of them? Answer:") for number in range(SEQUENCES)]
    others = [tokenizer.encode(f"Story {number}: " + "The ship sailed on. " * (number * 5)) for number in range(SEQUENCES)]
    return [head + tails[i] if i % 2 == 0 else others[i] for i in range(SEQUENCES)]


def params_of(number: int) -> SamplingParams:
    return SamplingParams(seed=number, temperature=[0.0, 1.0][number // 2 % 2], max_tokens=MAX_TOKENS, logprobs=3)


@pytest.mark.slow  # 20,000 tokens of prompts
@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0"])
def test_hits_chunks_and_preemption_change_no_bit(model: Decoder, prompts: list[list[int]], kv_dtype: str) -> None:
    groups = layer_groups(model.config.windows, CONTEXT)
    assert len(groups) > 1, "some layers have windows"
    settings: dict[str, object] = {"context_length": CONTEXT, "kv_dtype": kv_dtype, "groups": groups, "num_blocks": 2000}
    requests = {i: (prompt, params_of(i)) for i, prompt in enumerate(prompts)}
    engines = {
        "together": make_engine(model, **settings),
        "tight": make_engine(
            model, **{**settings, "num_blocks": 44 * len(groups)}, max_num_seqs=SEQUENCES, max_batch_tokens=72
        ),
        "alone": make_engine(model, **settings, max_num_seqs=1, prefix_cache=False),
    }
    found: dict[str, dict[int, list[Output]]] = {}
    for name, engine in engines.items():
        groups_of = [{i: request} for i, request in requests.items()] if name == "alone" else [requests]
        found[name] = {i: outputs for each in groups_of for i, outputs in run(engine, each).items()}
    again = run(engines["together"], requests)
    assert engines["tight"].stats().num_preemptions > 0
    assert finish_of(again[0]).cached_tokens >= HEAD - 64 > finish_of(found["alone"][0]).cached_tokens == 0
    for i in requests:
        expected = found["alone"][i]
        assert len(tokens_of(expected)) == MAX_TOKENS
        for other in (found["together"][i], found["tight"][i], again[i]):
            assert tokens_of(other) == tokens_of(expected), f"request {i}"
            assert [entry for o in other for entry in o.logprobs] == [entry for o in expected for entry in o.logprobs]
