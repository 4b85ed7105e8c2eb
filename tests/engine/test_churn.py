"""Random traffic under memory pressure: whatever happens around a request, its answer is the one it gives alone."""

from __future__ import annotations

import random

import pytest

from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.protocol import Caller, ServiceTier
from tests.engine.fake import NOT_A_NUMBER, RAISES, Answer, FakeConfig, FakeModel, Run, alone

TIERS: tuple[ServiceTier, ...] = ("priority", "default", "default", "flex")


def random_request(rng: random.Random, heads: list[list[int]]) -> tuple[list[int], dict[str, object]]:
    """A prompt that often shares its head with others, and parameters that use every way to end."""
    head = rng.choice(heads)
    prompt = head[: rng.randrange(1, len(head) + 1)] + [rng.randrange(90) for _ in range(rng.randrange(0, 20))]
    params: dict[str, object] = {
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.5]),
        "seed": rng.randrange(1000),
        "top_k": rng.choice([0, 1, 5, 40]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.1]),
        "typical_p": rng.choice([1.0, 1.0, 0.7]),
        "repeat_last_n": rng.choice([0, 8, 64, -1]),
        "repeat_penalty": rng.choice([1.0, 1.3]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "max_tokens": rng.choice([0, 1, 2, 17, 40, 70]),
        "num_keep": rng.choice([-1, 0, 4, 9]),
        "shift": rng.random() < 0.7,
        "context_length": rng.choice([0, 24, 40]),
        "stop_ids": (rng.randrange(90), rng.randrange(90)),
        "suppress_ids": rng.choice([(), (3, 4, 5), (500,)]),
        "logprobs": rng.choice([-1, -1, 0, 3]),
    }
    return prompt, params


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_the_one_given_alone(seed: int) -> None:
    """Pools from a quarter of the demand down to one request's worth; aborts, preemptions, prefix hits, shifts."""
    rng = random.Random(seed)
    heads = [[rng.randrange(90) for _ in range(32)] for _ in range(3)]
    block_size = rng.choice([1, 2, 4, 8, 16])
    run = Run(
        block_size=block_size,
        num_blocks=-(-rng.choice([64, 96, 160, 320]) // block_size),
        context_length=64,
        max_num_seqs=rng.choice([3, 8, 16]),
        max_batch_tokens=rng.choice([4, 16, 64]),
        slowdown=rng.choice([0.0, 2.5]),
    )
    requests = {i: random_request(rng, heads) for i in range(90)}
    for i in rng.sample(range(1, 90), 30):  # some have the prompt of the one that comes after them
        requests[i] = requests[i - 1][0], requests[i][1]
    callers = {i: Caller(rng.choice("abc"), rng.choice(TIERS)) for i in range(0, 90, 3)}
    aborted: set[int] = set()
    steps = 0
    waiting = list(requests)
    while waiting or run.engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
            if waiting:
                request_id = waiting.pop()
                prompt, params = requests[request_id]
                run.add(request_id, prompt, callers[request_id // 3 * 3], **params)
        if rng.random() < 0.03 and run.answers:
            victim = rng.choice(list(run.answers))
            if run.answers[victim].finish is None:
                aborted.add(victim)
            run.engine.abort(victim)
        run.step()
        steps += 1
        assert steps < 20_000
    run.drain()
    stats = run.engine.stats()
    assert stats.prefix_hit_tokens > 0
    shifts = 0
    for request_id, (prompt, params) in requests.items():
        got, expected = run.answers[request_id], alone(prompt, plan={"context_length": 64, "block_size": 8}, **params)
        assert got.finish is not None and expected.finish is not None
        if request_id in aborted and got.finish.reason == "abort":
            assert got.tokens == expected.tokens[: len(got.tokens)]
            continue
        assert (got.tokens, got.logprobs) == (expected.tokens, expected.logprobs), (request_id, params)
        assert (got.finish.reason, got.finish.error) == (expected.finish.reason, expected.finish.error)
        for name in ("prompt_tokens", "completion_tokens", "num_shifts"):
            assert getattr(got.finish, name) == getattr(expected.finish, name)
        shifts += got.finish.num_shifts
    assert shifts > 5


def test_pressure_makes_it_slow_not_wrong() -> None:
    """1,000 requests over a pool of a quarter of what those running together want: all finish, preempted ones too."""
    rng = random.Random(7)
    run = Run(num_blocks=40, max_num_seqs=16, max_batch_tokens=64, context_length=64)
    prompts = {i: [rng.randrange(90) for _ in range(rng.randrange(1, 24))] for i in range(1000)}
    for i, prompt in prompts.items():
        run.add(i, prompt, max_tokens=1 + i % 30)
    answers = run.drain()
    assert all(len(answer.tokens) == 1 + i % 30 for i, answer in answers.items())
    assert run.engine.stats().num_preemptions > 20
    for i in range(0, 1000, 10):
        assert answers[i].tokens == alone(prompts[i], max_tokens=1 + i % 30).tokens


def test_first_come_first_served_and_nobody_starves() -> None:
    run = Run(num_blocks=20, max_num_seqs=8, max_batch_tokens=32, context_length=72)
    run.add(0, [1] * 60, max_tokens=12)
    for i in range(1, 30):
        run.add(i, [i] * 8, max_tokens=12)
    finished: list[int] = []
    while run.engine.has_work:
        run.step()
        finished += [i for i, answer in run.answers.items() if answer.finish is not None and i not in finished]
    assert finished[0] == 0, "the oldest is never the one to be preempted"
    assert all(len(answer.tokens) == 12 for answer in run.answers.values())


def test_one_bad_request_in_the_churn() -> None:
    rng = random.Random(3)
    run = Run(num_blocks=64, max_num_seqs=16, max_batch_tokens=64)
    bad = {17: [1, 2, RAISES], 40: [5] * 20 + [NOT_A_NUMBER] * 2, 41: [6, RAISES] * 9}
    prompts = {i: bad.get(i, [5] * 20 + [i % 7]) for i in range(60)}
    for i, prompt in prompts.items():
        run.add(i, prompt, max_tokens=20, temperature=1.0, seed=i)
        if rng.random() < 0.5:
            run.step()
    answers = run.drain()
    for i, prompt in prompts.items():
        finish = answers[i].finish
        assert finish is not None and finish.reason == ("error" if i in bad else "length")
        if i not in bad:
            assert answers[i].tokens == alone(prompt, max_tokens=20, temperature=1.0, seed=i).tokens


@pytest.mark.parametrize("causal", [True, False])
def test_embeddings_in_the_churn(causal: bool) -> None:
    config = FakeConfig(causal=causal, pooling_type="mean")
    rng = random.Random(11)
    run = Run(FakeModel(config), num_blocks=24, max_num_seqs=6, max_batch_tokens=16)
    prompts = {i: [rng.randrange(90) for _ in range(rng.randrange(1, 60))] for i in range(60)}
    for i, prompt in prompts.items():
        run.embed(i, prompt)
        run.step()
        if i % 9 == 0:
            run.engine.abort(i)
    answers = run.drain()
    for i, prompt in prompts.items():
        embedding = answers[i].embedding
        assert embedding is not None
        if embedding.error:
            assert embedding.error == "aborted" and i % 9 == 0
            continue
        solo = Run(FakeModel(config), max_batch_tokens=512)
        solo.embed(0, prompt)
        expected = solo.drain()[0].embedding
        assert expected is not None and embedding.vector == expected.vector


def test_forgotten_release_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: one release that does not happen must show."""
    run = Run()
    run.add(0, [1, 2, 3, 4, 5], max_tokens=3)
    run.add(1, [6, 7], max_tokens=9)
    run.step()
    monkeypatch.setattr(BlockManager, "release", lambda self, seq, forget=False: None)
    run.engine.abort(0)
    assert "references" in run.engine.check_integrity() or "used" in run.engine.check_integrity()
    assert run.engine.stats().integrity != "ok"


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_secret_crosses_over(count: int) -> None:
    """Each prompt carries tokens of its own behind a head that all share; nobody's answer may depend on another's, whatever
    blocks they inherit. One in seven is aborted."""
    run = Run(num_blocks=24, max_num_seqs=8, max_batch_tokens=16, context_length=48)
    answers: dict[int, Answer] = {}
    for i in range(count):
        run.add(i, _secret(i), max_tokens=10)
        if i % 7 == 3:
            run.engine.abort(i - 2)
        if i % 3 == 0 or len(run.engine.scheduler.waiting) > 50:
            run.step()
    answers = run.drain()
    assert run.engine.stats().prefix_hit_tokens > 0
    compared = [i for i in range(0, count, 4 if count < 1000 else 1) if _reason(answers[i]) != "abort"]
    assert len(compared) > count // 6
    for i in compared:
        assert answers[i].tokens == alone(_secret(i), max_tokens=10).tokens


def _secret(i: int) -> list[int]:
    return [9, 9, 9, 9, i % 89, (i * 7) % 83, i // 89 % 89, 9]


def _reason(answer: Answer) -> str:
    assert answer.finish is not None
    return answer.finish.reason
