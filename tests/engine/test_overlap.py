"""Steps started before the results of the one before are read: the same answers, no block lost, one token too many at most."""

from __future__ import annotations

import random

import pytest

from ollamapy.engine.protocol import Caller
from tests.engine.device import Emulated
from tests.engine.fake import GROUPS, RAISES, FakeModel, Run, alone
from tests.engine.test_churn import TIERS, random_request

PROMPT = [5, 3, 8, 1, 9, 2, 7]


def test_steps_run_ahead() -> None:
    device = Emulated()
    run = Run(device=device)
    assert run.one(PROMPT, max_tokens=30).tokens == alone(PROMPT, max_tokens=30).tokens
    assert run.engine.overlap is not None and run.engine.overlap.num_ahead >= 27
    assert device.most_waiting == 2 and device.waiting == 0
    assert run.model.num_forwards == 30, "an end by length is foreseen"


def test_prompts_that_wait_for_a_seat_stop_nobody() -> None:
    """While all seats are taken nothing but decoding can come; one that falls free is taken at once."""
    run = Run(device=Emulated(), max_num_seqs=2)
    for request in range(4):
        run.add(request, [*PROMPT, request], max_tokens=20 + request)
    for _ in range(15):
        run.step()
    assert run.engine.stats().num_waiting == 2
    overlap = run.engine.overlap
    assert overlap is not None and overlap.num_ahead >= 12
    while run.answers[0].finish is None:
        run.step()
    assert run.engine.stats().num_waiting == 1, "by its length the end was foreseen"
    run.drain()
    for request, answer in run.answers.items():
        assert answer.tokens == alone([*PROMPT, request], max_tokens=20 + request).tokens


def test_a_seat_is_given_back_to_those_who_had_less() -> None:
    """A step in flight does not keep a request of a better tier waiting."""
    run, plain = Run(device=Emulated(), max_num_seqs=1), Run(max_num_seqs=1)
    for each in (run, plain):
        each.add(0, PROMPT, Caller("a", TIERS[-1]), max_tokens=60)
        for _ in range(4):
            each.step()
        each.add(1, [*PROMPT, 1], Caller("b", TIERS[0]), max_tokens=5)
        each.drain()
    assert run.engine.stats().num_preemptions == plain.engine.stats().num_preemptions
    assert [run.answers[i].tokens for i in (0, 1)] == [plain.answers[i].tokens for i in (0, 1)]


def test_a_stop_id_found_late_costs_one_token() -> None:
    tokens = alone(PROMPT, max_tokens=30).tokens
    stop = next(token for token in tokens[9:] if token not in tokens[:9])
    run = Run(device=Emulated())
    answer = run.one(PROMPT, max_tokens=30, stop_ids=(stop,))
    assert answer.tokens == tokens[: tokens.index(stop)] and answer.finish is not None and answer.finish.reason == "stop"
    assert answer.finish.completion_tokens == len(answer.tokens) + 1
    assert run.engine.overlap is not None and run.engine.overlap.num_discarded == 1
    again = run.one([*PROMPT, *answer.tokens, stop, 4], max_tokens=5)  # what was computed too much is in no prefix
    assert again.tokens == alone([*PROMPT, *answer.tokens, stop, 4], max_tokens=5).tokens


def test_an_abort_while_a_step_is_in_flight() -> None:
    run = Run(device=Emulated())
    run.add(0, PROMPT, max_tokens=30)
    run.add(1, [*PROMPT, 1], max_tokens=30)
    for _ in range(6):
        run.step()
    run.engine.abort(0)
    run.add(2, PROMPT, max_tokens=12)
    run.engine.abort(1)
    run.step()
    run.drain()
    assert run.answers[2].tokens == alone(PROMPT, max_tokens=12).tokens
    assert [run.answers[i].finish.reason for i in (0, 1)] == ["abort", "abort"]  # type: ignore[union-attr]


def test_an_engine_whose_requests_are_all_gone_comes_to_rest() -> None:
    run = Run(device=Emulated())
    run.add(0, PROMPT, max_tokens=30)
    for _ in range(5):
        run.step()
    run.engine.abort(0)
    assert run.engine.has_work
    run.drain()
    assert run.engine.overlap is not None and run.engine.overlap.flight is None


@pytest.mark.parametrize("params", [{"repeat_penalty": 1.3}, {"dry_multiplier": 0.8}, {"mirostat": 2}, {"typical_p": 0.5}])
def test_what_needs_the_token_before_waits_for_it(params: dict[str, object]) -> None:
    run, params = Run(device=Emulated()), {"temperature": 0.8, "seed": 4, **params}
    assert run.one(PROMPT, max_tokens=20, **params).tokens == alone(PROMPT, max_tokens=20, **params).tokens
    assert run.engine.overlap is not None and run.engine.overlap.num_ahead == 0


def test_guesses_are_looked_for_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(FakeModel(memory=1), device=Emulated())
    observe = run.engine.speculation.observe  # steps of one price: whether guesses pay must not depend on this machine
    monkeypatch.setattr(run.engine.speculation, "observe", lambda schedule, seconds: observe(schedule, 0.001))
    answer = run.one(PROMPT, max_tokens=60, speculation="auto")
    assert answer.tokens == alone(PROMPT, FakeModel(memory=1), max_tokens=60).tokens
    assert run.engine.stats().num_accepted_tokens > 0 and run.engine.overlap is not None and run.engine.overlap.num_ahead > 0


def test_a_step_that_fails_ends_the_request_at_fault() -> None:
    class Fails(FakeModel):
        def forward(self, batch, caches):  # type: ignore[no-untyped-def]
            if self.num_forwards == 9:
                self.fail_forwards = 1
            return super().forward(batch, caches)

    run = Run(Fails(), device=Emulated(), cuda_graphs=False)
    for request in range(3):
        run.add(request, [*PROMPT, request], max_tokens=20)
    run.add(3, [*PROMPT, RAISES], max_tokens=20)
    run.drain()
    assert run.answers[3].finish is not None and run.answers[3].finish.reason == "error"
    for request in range(3):
        assert run.answers[request].tokens == alone([*PROMPT, request], max_tokens=20).tokens


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_churn(seed: int, graphs: bool) -> None:
    """32 at a time under memory pressure, with aborts: each answer is the one given alone."""
    rng = random.Random(seed)
    heads = [[rng.randrange(90) for _ in range(32)] for _ in range(3)]
    settings: dict[str, object] = {"block_size": 8, "num_blocks": rng.choice([40, 120]), "context_length": 64}
    groups = GROUPS if seed == 1 else ()
    run = Run(device=Emulated(), max_num_seqs=32, max_batch_tokens=64, cuda_graphs=graphs, groups=groups, **settings)
    requests = {i: random_request(rng, heads) for i in range(80)}
    aborted: set[int] = set()
    waiting = list(requests)
    while waiting or run.engine.has_work:
        for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 8])):
            if waiting:
                request = waiting.pop()
                prompt, params = requests[request]
                plain = {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "typical_p": 1.0} if request % 4 else {}
                requests[request] = prompt, {**params, **plain}
                run.add(request, prompt, Caller(rng.choice("abc"), rng.choice(TIERS)), **requests[request][1])
        if rng.random() < 0.05 and run.answers:
            victim = rng.choice(list(run.answers))
            if run.answers[victim].finish is None:
                aborted.add(victim)
            run.engine.abort(victim)
        run.step()
    run.drain()
    overlap = run.engine.overlap
    assert overlap is not None and overlap.num_ahead > 3
    for request, (prompt, params) in requests.items():
        got, want = run.answers[request], alone(prompt, plan={"context_length": 64, "block_size": 8}, **params)
        assert got.finish is not None and want.finish is not None
        if request in aborted:
            assert got.tokens == want.tokens[: len(got.tokens)]
        else:
            assert got.tokens == want.tokens and got.finish.reason == want.finish.reason
            assert got.finish.completion_tokens == want.finish.completion_tokens
