"""Who is served when there is not room for all: shares between clients, urgent before patient, nobody for ever behind."""

from __future__ import annotations

import random
from array import array

import pytest

from ollamapy.engine import fairness
from ollamapy.engine.fairness import MAX_IDLE, PASSING, Queue, Shares, age, in_turn
from ollamapy.engine.protocol import Caller, SamplingParams, ServiceTier
from ollamapy.engine.sequence import Sequence
from tests.engine.fake import Run, alone

FLOOD, LIGHT = Caller("flood"), Caller("light")


def sequence(number: int, client: str, tier: ServiceTier = "default", arrival: int | None = None) -> Sequence:
    at = number if arrival is None else arrival
    return Sequence(number, array("q", [1]), SamplingParams(), 64, arrival_ns=at, caller=Caller(client, tier))


def steps_until_first_token(run: Run, request_id: int) -> int:
    steps = 0
    while not run.answers[request_id].tokens:
        run.step()
        steps += 1
        assert steps < 500
    return steps


@pytest.mark.parametrize("num_blocks", [400, 40])
def test_a_flood_does_not_hold_up_another_client(num_blocks: int) -> None:
    """Whether seats or memory are short: who has nothing running gets the youngest of those who have the most."""
    run = Run(num_blocks=num_blocks, max_num_seqs=8, max_batch_tokens=32)
    for i in range(200):
        run.add(i, [i % 80, 3, 5, 7], FLOOD, max_tokens=40)
    for _ in range(30):
        run.step()
    run.add(1000, [4, 4, 4], LIGHT, max_tokens=10)
    assert steps_until_first_token(run, 1000) <= 2
    for _ in range(9):
        run.step()
    assert run.answers[1000].finish is not None, "and it is not sent back while it is the only one"
    answers = run.drain()
    assert all(len(answers[i].tokens) == 40 for i in range(200))
    assert answers[1000].tokens == alone([4, 4, 4], max_tokens=10).tokens


def test_the_same_without_shares() -> None:
    """The check of the check: from one client, the last of so many waits for the others."""
    run = Run(num_blocks=400, max_num_seqs=8, max_batch_tokens=32)
    for i in range(60):
        run.add(i, [i % 80, 3, 5, 7], FLOOD, max_tokens=40)
    run.add(1000, [4, 4, 4], FLOOD, max_tokens=10)
    assert steps_until_first_token(run, 1000) > 7 * 40


def test_two_floods_share() -> None:
    """One asks for three times as much at a time: what each is served differs by no more than the bound of the paper."""
    run = Run(num_blocks=400, max_num_seqs=8, max_batch_tokens=64)
    served = {"a": 0, "b": 0}
    for i in range(120):
        run.add(i, [i % 80] * 4, Caller("a"), max_tokens=30)
    for i in range(120, 240):
        run.add(i, [i % 80] * 12, Caller("b"), max_tokens=90)
    worst = 0
    for _ in range(300):
        run.step()
        for client, ids in (("a", range(120)), ("b", range(120, 240))):
            shown = [run.answers[i].tokens for i in ids]
            served[client] = sum(2 * len(tokens) + (4 if client == "a" else 12) * bool(tokens) for tokens in shown)
        worst = max(worst, abs(served["a"] - served["b"]))
    assert min(served.values()) > 1000
    assert worst <= 2 * 8 * (12 + 2 * 90), "2 max(input, tokens of a full batch)"


def test_flex_goes_behind_and_makes_room() -> None:
    run = Run(num_blocks=400, max_num_seqs=4, max_batch_tokens=32)
    for i in range(8):
        run.add(i, [i, 3, 5], Caller("a", "flex"), max_tokens=50)
    run.step()
    for i in range(10, 14):
        run.add(i, [i, 3, 5], Caller("a"), max_tokens=20)
    for i in range(10, 14):
        assert steps_until_first_token(run, i) <= 1
    assert not any(run.answers[i].finish for i in range(8))
    answers = run.drain()
    assert all(len(answers[i].tokens) == 50 for i in range(8))
    assert run.engine.scheduler.num_preemptions >= 4


def test_flex_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a stream of interactive requests that never ends, a flex request has its turn."""
    monkeypatch.setattr(fairness, "AGED", 0)
    run = Run(num_blocks=400, max_num_seqs=2, max_batch_tokens=32)
    run.add(0, [1, 2, 3], Caller("a", "flex"), max_tokens=5)
    for i in range(1, 30):
        run.add(i, [i, 3, 5], Caller("a"), max_tokens=5)
        run.step()
    assert run.answers[0].finish is not None
    monkeypatch.setattr(fairness, "AGED", 10**15)
    run.add(100, [1, 2, 3], Caller("a", "flex"), max_tokens=5)
    for i in range(101, 130):
        run.add(i, [i, 3, 5], Caller("a"), max_tokens=5)
        run.step()
    assert not run.answers[100].tokens
    run.drain()


def test_priority_is_within_a_client() -> None:
    shares = Shares()
    queue = Queue(shares)
    for i, (client, tier) in enumerate(
        [("a", "default"), ("b", "default"), ("b", "priority"), ("a", "flex"), ("b", "default")]
    ):
        shares.arrive(client)
        queue.add(sequence(i, client, tier))  # type: ignore[arg-type]
    order = []
    while queue:
        seq = queue.next(0)
        queue.remove(seq)
        order.append(seq.request_id)
    assert order == [0, 2, 1, 4, 3]


def test_idleness_saves_nothing_up() -> None:
    shares = Shares()
    for client in ("a", "b"):
        shares.arrive(client)
    a, b = sequence(0, "a"), sequence(1, "b")
    shares.charge(a, 1000)
    shares.charge(b, 400)
    shares.leave("b")
    shares.charge(a, 5000)
    shares.arrive("b")
    assert shares.served(b) == 6000
    shares.leave("a")
    shares.leave("b")
    shares.arrive("c")
    assert shares.served(sequence(2, "c")) == 6000, "when nobody is there, where the last one stood"


def test_a_debt_is_not_forgotten_by_leaving() -> None:
    shares = Shares()
    shares.arrive("a")
    shares.arrive("b")
    shares.charge(sequence(0, "a"), 1000)
    shares.leave("a")
    shares.arrive("a")
    assert shares.served(sequence(0, "a")) == 1000


def test_clients_that_left_are_bounded() -> None:
    shares = Shares()
    for i in range(3 * MAX_IDLE):
        shares.arrive(str(i))
        shares.leave(str(i))
    assert len(shares) == 0 and len(shares._idle) == MAX_IDLE


def test_a_preempted_one_is_back_in_its_place() -> None:
    rng = random.Random(2)
    shares = Shares()
    queue = Queue(shares)
    shares.arrive("a")
    sequences = [sequence(i, "a") for i in range(50)]
    rng.shuffle(sequences)
    for seq in sequences:
        queue.add(seq)
    assert list(queue) == sorted(sequences, key=age) and len(queue) == 50


def test_short_prompts_pass_a_long_one_which_moves_on() -> None:
    run = Run(num_blocks=400, context_length=512, max_batch_tokens=16)
    run.add(0, [7] * 300, FLOOD, max_tokens=1)
    run.step()
    for i in range(1, 20):
        run.add(i, [i, 3, 5, 8, 2], FLOOD, max_tokens=1)
    assert steps_until_first_token(run, 19) <= 19 * 5 // 12 + 2
    assert run.engine.scheduler.sequences[0].num_computed >= 16 + 4 * 7, "a quarter of each step is its own"
    assert len(run.drain()[0].tokens) == 1


@pytest.mark.parametrize(("clients", "more"), [(1, -1), (6, 1)])
def test_prompts_of_about_one_length_are_computed_one_after_the_other(clients: int, more: int) -> None:
    """Side by side, the first tokens of all would come at the end. Those that come later have so many tokens `more`."""
    run = Run(num_blocks=400, context_length=512, max_batch_tokens=32, max_num_seqs=8)
    order: list[int] = []
    ends: list[int] = []
    while len(order) < 8:
        for i in {0: range(4), 6: range(4, 8)}.get(run.model.num_forwards, ()):
            run.add(i, [i] * (100 + i // 4 * more), Caller(str(i % clients)), max_tokens=1)
        run.step()
        new = [i for i in run.answers if run.answers[i].tokens and i not in order]
        order += new
        ends += [run.model.num_forwards] * len(new)
    assert order == list(range(8))
    assert ends == [-(-(number * 100 + max(number - 4, 0) * more) // 32) for number in range(1, 9)]


@pytest.mark.parametrize("passed", [0, 1])
def test_a_long_prompt_is_passed_for_so_long_only(passed: int) -> None:
    """By one of 70 tokens less when its client was served less than PASSING times that since it came."""
    shares = Shares()
    shares.arrive("a")
    long, short = sequence(0, "a"), sequence(1, "a")
    long.token_ids, short.token_ids = array("q", [1] * 100), array("q", [1] * 30)
    shares.charge(long, PASSING * 70 - 1 + passed)
    short.start = shares.served(short)
    assert in_turn([long, short], shares, 0) == ([long, short] if passed else [short, long])


def test_a_short_prompt_of_another_client_passes_a_long_one_that_has_begun() -> None:
    run = Run(num_blocks=400, context_length=512, max_batch_tokens=32)
    run.add(0, [7] * 400, FLOOD, max_tokens=1)
    for _ in range(3):
        run.step()
    run.add(1, [3] * 20, LIGHT, max_tokens=1)
    assert steps_until_first_token(run, 1) == 1
    run.drain()


def test_the_oldest_ends_under_endless_short_prompts() -> None:
    run = Run(num_blocks=100, context_length=256, max_batch_tokens=16, max_num_seqs=4)
    run.add(0, [7] * 200, FLOOD, max_tokens=3)
    steps = 0
    while run.answers[0].finish is None:
        run.add(1 + steps, [steps % 80, 3, 5, 8, 2] * 3, FLOOD, max_tokens=1)
        run.step()
        steps += 1
        assert steps <= 200 // 4 + 10
    run.drain()
