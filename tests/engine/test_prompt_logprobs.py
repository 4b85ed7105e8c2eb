"""Logprobs of a prompt's own tokens: against the model's logits, in chunks, under pressure, and beside reused prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ollamapy.engine import prompt_logprobs
from tests.engine.fake import FakeModel, Run, alone


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 80, size=length)]


def expected(tokens: list[int]) -> list[float]:
    """From the logprobs of generation: the model asked for its likeliest tokens after every beginning of the prompt."""
    found = []
    for end in range(1, len(tokens)):
        entry = alone(tokens[:end], max_tokens=1, logprobs=97).logprobs[0]
        found.append(dict(entry.top)[tokens[end]])
    return found


@pytest.mark.parametrize("budget", [1, 3, 4, 16, 512])
def test_every_token_but_the_first(budget: int) -> None:
    tokens = prompt(19)
    answer = Run(max_batch_tokens=budget, max_num_seqs=1).one(tokens, max_tokens=2, logprobs=1, prompt_logprobs=3)
    assert [entry.token_id for entry in answer.prompt_logprobs] == tokens[1:]
    assert [entry.logprob for entry in answer.prompt_logprobs] == expected(tokens)
    assert all(
        len(entry.top) == 3 and entry.top == sorted(entry.top, key=lambda pair: -pair[1]) for entry in answer.prompt_logprobs
    )
    assert answer.tokens == alone(tokens, max_tokens=2).tokens and len(answer.logprobs) == 2


def test_only_the_prompt() -> None:
    tokens = prompt(9)
    answer = Run().one(tokens, max_tokens=0, prompt_logprobs=0)
    assert answer.tokens == [] and answer.finish is not None and answer.finish.reason == "length"
    assert [entry.logprob for entry in answer.prompt_logprobs] == expected(tokens)
    assert Run().one([5], max_tokens=1, prompt_logprobs=2).prompt_logprobs == []


def test_a_cached_prefix_is_computed_again() -> None:
    run, tokens = Run(), prompt(24)
    run.one(tokens, max_tokens=1)
    again = run.one(tokens, max_tokens=1, prompt_logprobs=0)
    assert [entry.logprob for entry in again.prompt_logprobs] == expected(tokens)
    assert again.finish is not None and again.finish.cached_tokens == 0
    assert run.one(tokens, max_tokens=1).finish.cached_tokens > 0  # type: ignore[union-attr]


def test_under_pressure_each_position_is_told_once() -> None:
    """Few blocks: prompts are preempted halfway and begin anew."""
    run = Run(num_blocks=12, context_length=40, max_batch_tokens=6, max_num_seqs=6)
    prompts = {i: prompt(14 + i, seed=i) for i in range(8)}
    for i, tokens in prompts.items():
        run.add(i, tokens, max_tokens=12, prompt_logprobs=0, logprobs=0)
    answers = run.drain()
    assert run.engine.stats().num_preemptions > 0
    for i, tokens in prompts.items():
        assert [entry.token_id for entry in answers[i].prompt_logprobs] == tokens[1:]
        assert [entry.logprob for entry in answers[i].prompt_logprobs] == expected(tokens)


def test_logits_are_made_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_BYTES", 4 * 97 * 5)
    model = FakeModel()
    sizes: list[int] = []
    original = model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return original(hidden)

    monkeypatch.setattr(model, "logits", logits)
    tokens = prompt(23)
    answer = Run(model).one(tokens, max_tokens=0, prompt_logprobs=1)
    assert max(sizes) == 5 and [entry.logprob for entry in answer.prompt_logprobs] == expected(tokens)
