"""Speculation on a fake model: answers are those without it, bit by bit, and come in fewer steps."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ollamapy.engine.speculation_cost import StepCost
from tests.engine.fake import NOT_A_NUMBER, RAISES, VOCAB, Answer, FakeModel, Run, alone
from tests.engine.test_churn import random_request
from tests.engine.test_grammar import EOS, SHADOW, lark, reason, text
from tests.engine.test_grammar import engine as grammar_engine

PROMPT = [5, 3, 8, 1, 9, 2, 7, 5, 3]


class Free(StepCost):
    """Rows that cost nothing: every guess is verified, whatever the clock says."""

    known = True

    def __init__(self) -> None:
        super().__init__("cpu")

    def seconds(self, rows: int) -> float:
        return 1.0


def guessing(run: Run) -> Run:
    run.engine.speculation.cost = Free()
    return run


def looping(**plan: object) -> Run:
    """An engine that verifies every guess, on a model whose answers repeat themselves."""
    return guessing(Run(FakeModel(memory=1), **plan))


def same(got: Answer, expected: Answer) -> bool:
    assert got.finish is not None and expected.finish is not None
    for name in ("reason", "error", "completion_tokens", "num_shifts"):
        assert getattr(got.finish, name) == getattr(expected.finish, name)
    return (got.tokens, got.logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_the_same_answer_in_fewer_steps(block_size: int) -> None:
    expected = alone(PROMPT, FakeModel(memory=1), max_tokens=60)
    run = looping(block_size=block_size, num_blocks=256 // block_size)
    got = run.one(PROMPT, max_tokens=60, speculation="ngram")
    assert same(got, expected) and got.finish is not None
    assert got.finish.accepted_tokens > 30 and got.finish.drafted_tokens >= got.finish.accepted_tokens
    assert run.model.num_forwards == 60 - got.finish.accepted_tokens
    stats = run.engine.stats()
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (got.finish.drafted_tokens, got.finish.accepted_tokens)


def test_nothing_is_guessed_where_it_is_off() -> None:
    run = looping()
    answer = run.one(PROMPT, max_tokens=40)
    assert answer.finish is not None and answer.finish.drafted_tokens == 0 and run.model.num_forwards == 40


@pytest.mark.parametrize("num_draft", [1, 2, 5])
def test_a_request_may_limit_its_guesses(num_draft: int) -> None:
    run = looping()
    run.one(PROMPT, max_tokens=60, speculation="auto", num_draft=num_draft)
    assert max(tokens for _, tokens in run.model.batch_sizes[1:]) == 1 + num_draft


@pytest.mark.parametrize("max_tokens", range(1, 14))
@pytest.mark.parametrize("context_length", [12, 16, 40])
def test_limits_hold_amid_guesses(max_tokens: int, context_length: int) -> None:
    for shift in (True, False):
        params = {"max_tokens": max_tokens * 4, "shift": shift, "num_keep": 2}
        expected = alone(PROMPT, FakeModel(memory=1), plan={"context_length": context_length}, **params)
        got = looping(context_length=context_length).one(PROMPT, speculation="ngram", **params)
        assert same(got, expected)


def test_a_stop_id_amid_a_guess_ends_the_answer() -> None:
    tokens = alone(PROMPT, FakeModel(memory=1), max_tokens=60).tokens
    for stop in set(tokens):
        expected = alone(PROMPT + tokens[:30], FakeModel(memory=1), max_tokens=60, stop_ids=(stop,))
        assert same(looping().one(PROMPT + tokens[:30], max_tokens=60, stop_ids=(stop,), speculation="ngram"), expected)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "seed": 3, "top_k": 5},
        {"temperature": 1.0, "seed": 4, "top_k": 0, "top_p": 0.8, "logprobs": 3},
        {"temperature": 0.8, "seed": 5, "top_k": 40, "min_p": 0.2, "typical_p": 0.7},
        {"temperature": 0.0, "repeat_penalty": 1.1, "frequency_penalty": 0.1, "repeat_last_n": 12, "logprobs": 0},
        {"temperature": 0.5, "seed": 6, "repeat_penalty": 1.05, "presence_penalty": 0.2, "repeat_last_n": -1},
        {"temperature": 0.0, "dry_multiplier": 0.6, "dry_allowed_length": 3, "dry_penalty_last_n": 30, "logprobs": 1},
        {"temperature": 0.6, "seed": 7, "dry_multiplier": 0.4, "dry_breakers": (1, 5), "repeat_penalty": 1.05},
        {"temperature": 0.8, "seed": 8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"temperature": 0.0, "logit_bias": ((3, 1.5), (7, -2.0)), "logprobs": 2},
        {"temperature": 0.7, "seed": 9, "logit_bias": ((3, 0.5),), "xtc_probability": 0.3, "dry_multiplier": 0.3, "top_k": 12},
    ],
)
def test_a_seed_gives_the_same_answer(params: dict[str, object]) -> None:
    accepted = 0
    for start in range(12):
        prompt = [*PROMPT, start]
        expected = alone(prompt, FakeModel(memory=1), max_tokens=80, **params)
        got = looping().one(prompt, max_tokens=80, speculation="ngram", **params)
        assert same(got, expected) and got.finish is not None
        accepted += got.finish.accepted_tokens
    assert accepted > 20


@pytest.mark.parametrize("seed", range(4))
def test_churn_with_and_without_guesses(seed: int) -> None:
    """Mixed batches in small pools: preemptions, prefix hits, shifts, every way to end."""
    rng = random.Random(seed)
    heads = [[rng.randrange(90) for _ in range(32)] for _ in range(3)]
    run = looping(block_size=rng.choice([1, 2, 4, 8]), num_blocks=64, context_length=64, max_num_seqs=8, max_batch_tokens=24)
    requests = {i: random_request(rng, heads) for i in range(60)}
    modes = {i: rng.choice(["ngram", "auto", "off"]) for i in requests}
    for i, (prompt, params) in requests.items():
        run.add(i, prompt, **params, speculation=modes[i])
        run.step()
    run.drain()
    assert run.engine.stats().num_accepted_tokens > 50 and max(tokens for _, tokens in run.model.batch_sizes) <= 24
    for i, (prompt, params) in requests.items():
        assert same(run.answers[i], alone(prompt, FakeModel(memory=1), plan={"context_length": 64, "block_size": 8}, **params))


def test_sampled_tokens_have_the_models_distribution() -> None:
    """Pearson's chi-square over two tokens of a guess, against probabilities computed here from the model's table."""
    model = FakeModel(memory=1)
    settings = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.02, "frequency_penalty": 0.5, "repeat_last_n": 4}
    tail = [1, 6, 5, 8]
    first = probabilities(model, tail, settings)
    likeliest = {a: next(iter(probabilities(model, [*tail, a], settings))) for a in first}
    prompt = [token for a, b in likeliest.items() for token in (8, a, b)] + tail  # there is a guess after any first token
    joint = {(a, b): p * q for a, p in first.items() for b, q in probabilities(model, [*prompt, a], settings).items()}
    total = 4000
    run = guessing(Run(model, num_blocks=512, max_num_seqs=64))
    for i in range(total):
        run.add(i, prompt, seed=i, max_tokens=4, speculation="ngram", **settings)
    drawn = [tuple(answer.tokens[:2]) for answer in run.drain().values()]
    assert run.engine.stats().num_draft_tokens > total and set(drawn) <= set(joint)
    observed = np.array([drawn.count(pair) for pair in joint])
    expected = np.array([total * p for p in joint.values()])
    kept = expected >= 5
    statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert freedom >= 8 and statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)  # 4 sigma


def probabilities(model: FakeModel, tokens: list[int], settings: dict[str, float]) -> dict[int, float]:
    """The distribution of the next token, in the order of llama.cpp's samplers, in the plainest way."""
    run = Run(model)
    run.add(0, tokens, max_tokens=1, logprobs=VOCAB)
    run.step()
    logits = dict(run.answers[0].logprobs[0].top)
    for token in tokens[-int(settings["repeat_last_n"]) :]:
        logits[token] -= settings["frequency_penalty"]
    top = sorted(logits.items(), key=lambda item: -item[1])[: int(settings["top_k"])]
    weights = np.exp([value - top[0][1] for _, value in top])
    before = np.cumsum(weights) - weights
    kept = before < settings["top_p"] * weights.sum()
    kept &= weights >= settings["min_p"]
    heated = np.where(kept, weights ** (1 / settings["temperature"]), 0.0)
    return {token: float(w) for (token, _), w in zip(top, heated / heated.sum(), strict=True) if w}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammars_hold_amid_guesses(temperature: float) -> None:
    """Guesses that a grammar forbids are not verified; the matcher is where the answer is after wrong ones."""
    grammar = lark('start: ("[" item ("," item)* "]"){3}\nitem: "tru" | "no" | "yes"')
    accepted = 0
    for seed in range(16):
        params = {"grammar": grammar, "temperature": temperature, "seed": seed, "max_tokens": 90, "stop_ids": (SHADOW, EOS)}
        plain = grammar_engine()
        plain.model.memory = 1
        run = guessing(grammar_engine())
        run.model.memory = 1
        prompt = [*PROMPT, seed]
        expected, got = plain.one(prompt, **params), run.one(prompt, **params, speculation="ngram")
        assert same(got, expected) and reason(got) in ("stop", "length") and text(got) == text(expected)
        assert got.finish is not None
        accepted += got.finish.accepted_tokens
    assert accepted > 50


def test_a_failure_ends_only_its_request() -> None:
    for bad in (RAISES, NOT_A_NUMBER):
        run = looping()
        for i in range(6):
            run.add(i, [*PROMPT, i], max_tokens=40, speculation="ngram")
        for _ in range(8):
            run.step()
        run.add(9, [1, bad, 2], max_tokens=5, speculation="ngram")
        run.drain()
        assert run.answers[9].finish is not None and run.answers[9].finish.reason == "error"
        for i in range(6):
            assert same(run.answers[i], alone([*PROMPT, i], FakeModel(memory=1), max_tokens=40))


def test_a_step_that_fails_is_run_again_with_its_guesses() -> None:
    run = looping()
    for i in range(6):
        run.add(i, [*PROMPT, i], max_tokens=40, speculation="ngram")
    for _ in range(12):
        run.step()
    run.model.fail_forwards = 1
    run.drain()
    assert run.model.fail_forwards == 0 and run.engine.stats().num_accepted_tokens > 40
    for i in range(6):
        assert same(run.answers[i], alone([*PROMPT, i], FakeModel(memory=1), max_tokens=40))
