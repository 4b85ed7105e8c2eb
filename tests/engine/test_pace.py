"""How much of a prompt goes beside those who wait for a next token, by what steps have cost; and that it moves on."""

from __future__ import annotations

import pytest

from ollamapy.engine import pace
from ollamapy.engine.pace import FIRST, MIN_CHUNK, PROBE_AFTER, Pace
from tests.engine.fake import Run, alone


def simulated(pace: Pace, decode: float, prompt: float, num_decodes: int, tokens: int) -> list[tuple[int, float]]:
    """Chunks and seconds of the steps that compute a prompt of so many tokens."""
    steps: list[tuple[int, float]] = []
    while tokens:
        chunk = min(pace.budget(num_decodes), tokens)
        seconds = (decode if num_decodes else 0.0) + prompt * chunk
        pace.record(num_decodes, chunk, seconds)
        tokens -= chunk
        steps.append((chunk, seconds))
        assert len(steps) < 10_000
    return steps


@pytest.mark.parametrize("decode", [0.002, 0.01, 0.1])
@pytest.mark.parametrize("prompt", [0.00003, 0.0007, 0.002])
@pytest.mark.parametrize("num_decodes", [1, 4, 60])
def test_a_step_takes_at_most_so_much_longer(decode: float, prompt: float, num_decodes: int) -> None:
    pace = Pace(512, 2.5)
    steps = simulated(pace, decode, prompt, num_decodes, 8192)
    worst = max(seconds for _, seconds in steps)
    assert worst <= max(2.5 * decode, decode + MIN_CHUNK * prompt) * 1.001
    chunks = [chunk for chunk, _ in simulated(pace, decode, prompt, num_decodes, 4096)[:-1] if chunk]
    assert min(chunks) >= min(0.9 * 1.5 * decode / prompt, 512 - num_decodes) - 1, "and no shorter than it has to be"


def test_beside_nobody_the_budget_is_whole() -> None:
    assert [chunk for chunk, _ in simulated(Pace(512, 2.5), 0.01, 0.001, 0, 2048)] == [512] * 4


def test_off() -> None:
    pace = Pace(512, 0.0)
    pace.record(4, 0, 0.01)
    pace.record(4, 100, 1.0)
    assert pace.budget(4) == 508


def test_it_learns_anew() -> None:
    """Decoding got slower, or faster, while prompts were in every step: a step without one shows it."""
    pace = Pace(512, 2.5)
    simulated(pace, 0.01, 0.001, 4, 200)
    assert pace.budget(4) in (14, 15)
    before = sum(1 for chunk, _ in simulated(pace, 0.04, 0.001, 4, 3000) if not chunk)
    assert before >= 3, f"a probe each {PROBE_AFTER} s"
    assert 20 <= pace.budget(4) <= 62


def test_one_slow_step_does_not_stop_a_prompt() -> None:
    pace = Pace(512, 2.5)
    simulated(pace, 0.01, 0.0005, 4, 200)
    usual = pace.budget(4)
    pace.record(4, usual, 10.0)
    assert pace.budget(4) == 0
    pace.record(4, 0, 0.01)
    assert usual / 2 <= pace.budget(4) <= usual


def paced(run: Run, decode: float, prompt: float) -> None:
    """Lets the pace be what such costs lead to, whatever steps take here."""
    pace = run.engine.scheduler.pace
    pace.record = lambda *_: None  # type: ignore[method-assign]
    pace._decode, pace._prompt = dict.fromkeys(range(8), decode), prompt


def test_paced_prompts_give_the_same_answers() -> None:
    run = Run(slowdown=1.1, max_batch_tokens=64, num_blocks=256)
    paced(run, 0.01, 0.001)
    prompts = {i: [i % 80, *range(60)] for i in range(12)}
    for i, prompt in prompts.items():
        run.add(i, prompt, max_tokens=20)
        run.step()
        run.step()
    for i, answer in run.drain().items():
        assert answer.tokens == alone(prompts[i], max_tokens=20).tokens
    beside = [tokens - seqs for seqs, tokens in run.model.batch_sizes if seqs > 2]
    assert MIN_CHUNK <= max(beside) < 60, "chunks beside others were smaller than the prompt"


def test_a_burst_of_short_prompts_waits_less_than_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is 15 tokens beside others, short prompts may take 37: three of ten in a step, less what the long one keeps."""
    monkeypatch.setattr(pace, "CROWDED", 0.0)
    run = Run(slowdown=2.5, max_batch_tokens=512, num_blocks=512)
    paced(run, 0.01, 0.001)
    run.add(0, [1], max_tokens=60)
    run.step()
    run.step()
    run.add(1, [2, *range(80)] + [5] * 20, max_tokens=1)
    for i in range(2, 14):
        run.add(i, [i, *range(9)], max_tokens=40)
    for _ in range(4):
        run.step()
    assert run.model.batch_sizes[2:6] == [(5 + 3 * step, 1 + 3 * step + 30 + 4) for step in range(4)]
    seq = run.engine.scheduler.sequences[1]
    run.step()
    assert seq.num_computed == 4 * 4 + 15, "alone it has the whole chunk"
    for i, answer in run.drain().items():
        assert answer.finish is not None and len(answer.tokens) == (60 if i == 0 else 1 if i == 1 else 40)
    assert max(tokens - seqs for seqs, tokens in run.model.batch_sizes[6:]) <= 15, "nor has its last chunk more"


def test_a_crowd_of_prompts_has_a_larger_share() -> None:
    """Eleven prompts of 100 tokens beside one that decodes for 10 ms: 100 tokens (CROWDED), and less for fewer, down to 15."""
    run = Run(slowdown=2.5, max_batch_tokens=512, num_blocks=512, context_length=256)
    paced(run, 0.01, 0.001)
    run.add(0, [1], max_tokens=60)
    run.step()
    run.step()
    for i in range(1, 12):
        run.add(i, [i] * 100, max_tokens=60)
    run.drain()
    beside = [tokens - seqs for seqs, tokens in run.model.batch_sizes[2:]]
    assert 95 <= beside[0] <= 100 and max(beside) <= 100
    assert MIN_CHUNK < min(each for each in beside if each) <= 15
    assert Pace(512, 2.5).budget(1, crowd=100.0) == 0, "not before it is known what decoding takes"


def test_a_crowd_is_no_reason_beside_many_that_decode() -> None:
    steady = Pace(512, 2.5)
    simulated(steady, 0.01, 0.001, 4, 200)
    assert steady.budget(4, crowd=0.25) == steady.budget(4), "two prompts, four that decode"
    assert steady.budget(4, crowd=1.0) == pytest.approx(FIRST * 0.01 / 0.001, abs=1)
    assert steady.budget(4, crowd=1000.0) == pytest.approx(100, abs=1)


def test_one_long_prompt_is_no_crowd() -> None:
    """Beside a single chat, its steps take 2.5 times as long, not 1 + FIRST."""
    run = Run(slowdown=2.5, max_batch_tokens=512, num_blocks=512, context_length=256)
    paced(run, 0.01, 0.001)
    run.add(0, [1], max_tokens=60)
    run.step()
    run.step()
    run.add(1, [2] * 200, max_tokens=1)
    run.drain()
    assert max(tokens - seqs for seqs, tokens in run.model.batch_sizes) == 15 - 1


def test_few_rows_tell_of_more() -> None:
    """No step is spent on learning what another number of rows takes while a burst waits; a smaller number is known."""
    known = Pace(512, 2.5)
    known.record(1, 0, 0.01)
    known.record(1, 100, 0.11)
    assert all(known.budget(rows) in (14, 15) for rows in (1, 2, 8, 64))
    fewer = Pace(512, 2.5)
    fewer.record(8, 0, 0.01)
    fewer.record(8, 100, 0.11)
    assert fewer.budget(2) == 0, "of a larger one nothing follows"


def test_what_decoding_takes_shows_in_mixed_steps_too() -> None:
    """A burst: more decode in each step, and none does nothing else. Taken for the prompts' time, they would be held up."""
    known = Pace(512, 2.5)
    known.record(0, 256, 0.256 * 0.35)
    known.record(1, 0, 0.005)
    for rows in (3, 7, 12, 20):
        chunk = known.budget(rows)
        known.record(rows, chunk, 0.005 * rows + 0.00035 * chunk)
        assert known.budget(rows) == pytest.approx(1.5 * 0.005 * rows / 0.00035, rel=0.1)
    known.record(20, 0, 0.02)
    assert known.budget(20) == pytest.approx(1.5 * 0.02 / 0.00035, rel=0.1), "what was seen counts"


def test_a_prompt_of_three_tokens_says_little_of_others() -> None:
    known = Pace(512, 2.5)
    known.record(0, 256, 0.256)
    known.record(1, 0, 0.01)
    usual = known.budget(1)
    for _ in range(3):
        known.record(0, 3, 0.02)
    assert known.budget(1) >= 0.8 * usual


def test_the_oldest_moves_on_beside_a_stream_of_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CROWDED", 0.0)
    run = Run(slowdown=2.5, max_batch_tokens=512, num_blocks=512, max_num_seqs=16)
    paced(run, 0.01, 0.001)
    run.add(0, [1], max_tokens=120)
    run.step()
    run.add(1, [2] * 100, max_tokens=1)
    for i in range(2, 202):
        run.add(i, [i % 80, *range(14)], max_tokens=1)
    for _ in range(30):  # 15 // 4 and one tokens each
        run.step()
    assert run.answers[1].finish is not None and run.engine.scheduler.waiting
    run.drain()
