"""Guesses of a draft model, which may think alike, err, or fail."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.fake import FakeModel, Run, alone
from tests.engine.test_churn import random_request
from tests.engine.test_speculation import PROMPT, guessing, same


class Astray(FakeModel):
    """Says what the model says, but for some of its states."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        astray = hidden[:, 0].long() % 5 == 0
        return super().logits(hidden + astray.unsqueeze(1).float())


def drafted(draft: FakeModel, num_draft_blocks: int = 64, **plan: object) -> Run:
    """An engine with a draft model, both without a loop in their answers."""
    run = Run(FakeModel(memory=3), draft=draft, num_draft_blocks=num_draft_blocks, **plan)
    return guessing(run)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_a_draft_model_that_thinks_alike_is_always_right(block_size: int) -> None:
    for params in ({"temperature": 0.0}, {"temperature": 1.2, "seed": 5, "top_k": 20, "repeat_penalty": 1.2}):
        expected = alone(PROMPT, FakeModel(memory=3), max_tokens=60, **params)
        run = drafted(FakeModel(memory=3), block_size=block_size, num_blocks=256 // block_size)
        got = run.one(PROMPT, max_tokens=60, speculation="draft", **params)
        assert same(got, expected) and got.finish is not None
        assert got.finish.drafted_tokens == got.finish.accepted_tokens > 45 and run.model.num_forwards < 14


def test_a_draft_model_may_err() -> None:
    draft = Astray(memory=3)
    run = drafted(draft)
    rng = random.Random(1)
    requests = {i: [rng.randrange(90) for _ in range(20)] for i in range(20)}
    for i, prompt in requests.items():
        run.add(i, prompt, max_tokens=30, seed=i, temperature=[0.0, 1.0][i % 2], speculation=["draft", "auto", "off"][i % 3])
        run.step()
    run.drain()
    stats = run.engine.stats()
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 100 and draft.num_forwards > 0
    for i, prompt in requests.items():
        assert same(run.answers[i], alone(prompt, FakeModel(memory=3), max_tokens=30, seed=i, temperature=[0.0, 1.0][i % 2]))


@pytest.mark.parametrize("seed", range(4))
def test_churn_beside_a_draft_model(seed: int) -> None:
    """Preemptions, shifts, aborts, prefix hits; the draft model's own pool is too small for all."""
    rng = random.Random(seed)
    heads = [[rng.randrange(90) for _ in range(32)] for _ in range(3)]
    settings: dict[str, object] = {"block_size": rng.choice([1, 2, 4, 8]), "context_length": 64, "max_num_seqs": 8}
    run = drafted(Astray(memory=3), rng.choice([20, 64]), num_blocks=64, max_batch_tokens=24, **settings)
    requests = {i: random_request(rng, heads) for i in range(60)}
    for i, (prompt, params) in requests.items():
        run.add(i, prompt, **params, speculation=rng.choice(["draft", "auto", "ngram"]))
        run.step()
        if rng.random() < 0.05:
            run.engine.abort(i)
    run.drain()
    assert run.engine.stats().num_accepted_tokens > 0
    for i, (prompt, params) in requests.items():
        expected = alone(prompt, FakeModel(memory=3), plan={"context_length": 64, "block_size": 8}, **params)
        finish = run.answers[i].finish
        assert (finish is not None and finish.reason == "abort") or same(run.answers[i], expected)


def test_a_draft_model_that_fails_is_done_without() -> None:
    draft = FakeModel(memory=3, broken=True)
    run = drafted(draft)
    assert same(run.one(PROMPT, max_tokens=30, speculation="draft"), alone(PROMPT, FakeModel(memory=3), max_tokens=30))
    assert draft.num_forwards == 1
