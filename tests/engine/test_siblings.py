"""Requests with one prompt, as `n` choices are: it is computed once, its blocks are shared, and no answer shows it."""

from __future__ import annotations

import pytest

from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.fairness import AGED
from ollamapy.engine.protocol import Caller
from ollamapy.engine.sequence import Sequence
from ollamapy.engine.siblings import Siblings
from tests.engine.device import Emulated
from tests.engine.fake import GROUPS, RAISES, Run, alone
from tests.engine.test_blocks import sequence

PROMPT = [1 + 7 * i % 80 for i in range(27)]  # 6 blocks and 3 tokens
PARAMS: dict[str, object] = {"temperature": 1.0, "top_k": 0, "max_tokens": 20, "logprobs": 2}


def add_choices(run: Run, n: int, prompt: list[int] = PROMPT, **params: object) -> None:
    for choice in range(n):
        run.add(choice, prompt, **{**PARAMS, "seed": choice, **params})


def check_answers(run: Run, choices: range, prompt: list[int] = PROMPT) -> None:
    for choice in choices:
        got, expected = run.answers[choice], alone(prompt, **PARAMS, seed=choice)
        assert got.tokens == expected.tokens and got.logprobs == expected.logprobs
        assert got.finish is not None and got.finish.prompt_tokens == len(prompt)


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["full", "windowed"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 27, 28, 29])
def test_a_prompt_is_computed_once(length: int, groups: object) -> None:
    run = Run(groups=groups)
    prompt = PROMPT[:length] if length <= 27 else PROMPT + [5, 6][: length - 27]
    add_choices(run, 5, prompt)
    run.drain()
    check_answers(run, range(5), prompt)
    assert run.model.batch_sizes[0] == (1, length), "the others wait"
    assert run.model.batch_sizes[1] == (5, 5), "and compute its last token only"
    assert [run.answers[choice].finish.cached_tokens for choice in range(5)] == [0] + 4 * [length - 1]  # type: ignore[union-attr]


def test_the_last_block_is_shared_until_it_is_written() -> None:
    run = Run(max_num_seqs=8)
    add_choices(run, 4)
    run.step()
    scheduler, blocks = run.engine.scheduler, run.engine.scheduler.blocks
    first = run.engine.scheduler.sequences[0]
    shared = list(first.block_tables[0])
    assert len(shared) == 7 and scheduler.num_waiting == 3 and blocks.books().references[shared[6]] == 1
    step = scheduler.schedule()
    tables = [list(seq.block_tables[0]) for seq in scheduler.running]
    assert all(table[:6] == shared[:6] for table in tables) and all(blocks.books().references[b] == 4 for b in shared[:6])
    tails = [table[6] for table in tables]
    assert len(set(tails)) == 4 and shared[6] in tails and [blocks.books().references[b] for b in tails] == 4 * [1]
    assert sorted(target for _, target in step.copies) == sorted(set(tails) - {shared[6]})
    assert {source for source, _ in step.copies} == {shared[6]}
    run.engine.runner.copy_blocks(step.copies)
    scheduler.commit(step, run.engine.execution.run(step))
    run.drain()
    assert all(answer.finish is not None and answer.finish.reason == "length" for answer in run.answers.values())


def test_the_first_may_leave_at_any_time() -> None:
    """Aborted in the n-th step, for all n: the next one goes on, and none is held for ever."""
    for steps in range(14):
        run = Run(max_batch_tokens=4)
        add_choices(run, 4)
        for _ in range(steps):
            run.step()
        run.engine.abort(0)
        run.drain()
        check_answers(run, range(1, 4))
        computed = sum(tokens for _, tokens in run.model.batch_sizes)
        assert computed <= 27 + 4 * 20 + 4 + 3, "the prefix cache has what the first had computed"


def test_held_ones_may_leave() -> None:
    run = Run(max_batch_tokens=4)
    add_choices(run, 4)
    run.step()
    run.engine.abort(2)
    assert run.engine.stats().num_waiting == 2
    run.engine.abort(1)
    run.engine.abort(3)
    run.drain()
    check_answers(run, range(1))


def test_only_equals_are_held() -> None:
    """Of another caller, with another salt, another prompt, or whose prompt is to be told: nobody waits for a stranger."""
    run = Run(max_num_seqs=8, max_batch_tokens=8)
    run.add(0, PROMPT, max_tokens=4)
    run.add(1, PROMPT, Caller("other"), max_tokens=4)
    run.add(2, PROMPT, max_tokens=4, cache_salt="other")
    run.add(3, PROMPT[:26], max_tokens=4)
    run.add(4, PROMPT, max_tokens=4, prompt_logprobs=0)
    assert run.engine.scheduler.siblings.num_held == 0
    run.add(5, PROMPT, max_tokens=4)
    assert run.engine.scheduler.siblings.num_held == 1
    answers = run.drain()
    assert all(answers[i].tokens == alone(PROMPT[: 26 if i == 3 else 27], max_tokens=4).tokens for i in range(6))


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["full", "windowed"])
def test_while_steps_are_in_flight(groups: object) -> None:
    """Some come when the first decodes already, in the same block still or far beyond it; one leaves."""
    run = Run(groups=groups, device=Emulated(), max_num_seqs=8)
    params = {name: value for name, value in PARAMS.items() if name != "logprobs"}
    run.add(0, PROMPT, **params, seed=0)
    for choice in range(1, 12):
        run.step()
        run.add(choice, PROMPT, **params, seed=choice)
        if choice == 7:
            run.engine.abort(3)
    run.drain()
    assert run.engine.overlap is not None and run.engine.overlap.num_ahead
    for choice in (0, 1, 2, *range(4, 12)):
        assert run.answers[choice].tokens == alone(PROMPT, **params, seed=choice).tokens
    assert run.engine.stats().prefix_hit_tokens >= 10 * 24


def test_a_prompt_that_fails_fails_for_each() -> None:
    run = Run()
    add_choices(run, 3, [*PROMPT, RAISES])
    answers = run.drain()
    assert [answer.finish.reason for answer in answers.values() if answer.finish] == 3 * ["error"]


@pytest.mark.parametrize("groups", [(), GROUPS], ids=["full", "windowed"])
@pytest.mark.parametrize("num_blocks", range(12, 34, 3))
def test_too_few_blocks(num_blocks: int, groups: object) -> None:
    """A quarter of what eight need up to all of it: some are put back, and begin again from shared blocks or from nothing."""
    run = Run(num_blocks=num_blocks * (2 if groups else 1), context_length=48, groups=groups, max_batch_tokens=16)
    add_choices(run, 8)
    run.drain()
    check_answers(run, range(8))
    assert num_blocks > 24 or run.engine.stats().num_preemptions


def test_the_first_makes_room_for_the_one_that_was_to_share_its_last_block() -> None:
    """A flex request that has aged takes the seat of a younger one: what that had is not there any more."""
    run = Run(max_num_seqs=1)
    caller = Caller("a", "flex")
    run.add(0, PROMPT, caller, **PARAMS, seed=0)
    run.step()
    run.add(1, PROMPT, caller, **PARAMS, seed=1)
    run.engine.scheduler.sequences[1].arrival_ns -= AGED
    assert not run.engine.scheduler.siblings.num_held, "its prompt is there"
    run.step()
    assert run.engine.stats().num_preemptions == 1
    run.drain()
    check_answers(run, range(2))


def test_shifted_context_is_no_ones_prompt() -> None:
    run = Run(context_length=32)
    add_choices(run, 3, max_tokens=40)
    for _ in range(12):
        run.step()
    assert run.engine.scheduler.sequences[0].num_shifts
    run.add(3, PROMPT, **{**PARAMS, "seed": 3, "max_tokens": 40})
    answers = run.drain()
    for choice in range(4):
        expected = alone(PROMPT, plan={"context_length": 32}, **{**PARAMS, "max_tokens": 40}, seed=choice)
        assert answers[choice].tokens == expected.tokens


def test_a_former_siblings_name_goes_before_the_block_is_written() -> None:
    """The first has filled the block with its own answer, so the prefix cache knows it, and ends before the other writes."""
    blocks, siblings = BlockManager(8, 4), Siblings()
    first, other, later = (sequence([1, 2, 3, 4, 5, 6, 7, 8, 9][:length], id) for id, length in enumerate((6, 6, 9)))
    assert not siblings.arrive(first)
    _compute(blocks, first)
    first.token_ids.extend([7, 8])
    _compute(blocks, first)
    assert not siblings.arrive(other), "there is nothing to wait for"
    blocks.share(other, siblings.extended(other, blocks.lookup(other), 4))
    assert other.num_computed == 5 and other.block_tables == first.block_tables and blocks.lookup(later).num_blocks == 2
    blocks.release(first)
    assert blocks.grow(other, 6) and not blocks.copies and blocks.check([other]) == []
    assert blocks.lookup(later).num_blocks == 1


def _compute(blocks: BlockManager, seq: Sequence) -> None:
    assert blocks.grow(seq, len(seq.token_ids))
    seq.num_computed = len(seq.token_ids)
    blocks.register(seq)


def test_a_copy_needs_a_block() -> None:
    blocks, siblings = BlockManager(2, 4), Siblings()
    first, other = sequence([1, 2, 3, 4, 5, 6]), sequence([1, 2, 3, 4, 5, 6], 1)
    assert not siblings.arrive(first) and siblings.arrive(other)
    _compute(blocks, first)
    found = siblings.extended(other, blocks.lookup(other), 4)
    assert blocks.needed(other, found) == 1
    blocks.share(other, found)
    before = list(other.block_tables[0])
    assert blocks.room(other) == 0 and not blocks.grow(other, 6) and not blocks.grow(first, 7)
    assert list(other.block_tables[0]) == before and not blocks.copies and blocks.check([first, other]) == []
    blocks.release(first)
    assert blocks.room(other) == 3 and blocks.grow(other, 6) and not blocks.copies
