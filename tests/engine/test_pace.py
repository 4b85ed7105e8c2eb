"""How much of a prompt goes beside those who wait for a next token, by what steps have cost; and that it moves on."""

from __future__ import annotations

import pytest

from ollamapy.engine.pace import MIN_CHUNK, PROBE_AFTER, Pace
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
    assert max(beside) == MIN_CHUNK - 1, "chunks beside others were smaller than the prompt"


def test_a_burst_of_short_prompts_waits_less_than_a_long_one() -> None:
    """A chunk is 15 tokens beside others, short prompts may take 37: three of ten in a step, less what the long one keeps."""
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


def test_the_oldest_moves_on_beside_a_stream_of_short_prompts() -> None:
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
