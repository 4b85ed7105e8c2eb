"""Layer groups: how layers are grouped, what windowed groups give back, and that neither shows in any answer."""

from __future__ import annotations

import random
from array import array

import pytest

from ollamapy.engine.block_check import GONE
from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.groups import blocks_of, layer_groups
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sequence import Sequence
from tests.engine.fake import GROUPS, WINDOW, FakeModel, Run, alone


def windows_of(layers: int, window: int, period: int) -> list[int]:
    return [window if layer % period < period - 1 else 0 for layer in range(layers)]


@pytest.mark.parametrize(
    ("windows", "context", "sizes"),
    [
        (windows_of(18, 512, 6), 32768, [3] * 6),  # gemma3 270m: 3 full, 15 windowed
        (windows_of(26, 512, 6), 32768, [4] * 6 + [2]),  # 1b: 4 and 22
        (windows_of(34, 1024, 6), 32768, [5] * 6 + [4]),  # 4b: 5 and 29
        (windows_of(62, 1024, 6), 32768, [6, 4] + [6] * 8 + [4]),  # 27b: 10 and 52; tens would leave 13 % unused
        (windows_of(26, 4096, 2), 8192, [13, 13]),  # gemma2 2b
        (windows_of(26, 4096, 2), 4096, []),  # no sequence outgrows the window
        ([4096] * 32, 32768, [32]),
        ([0] * 32, 32768, []),
        ([512, 0, 0, 0, 0, 0, 0], 4096, [1] * 7),
    ],
)
def test_groups_cover_all_layers_with_little_padding(windows: list[int], context: int, sizes: list[int]) -> None:
    groups = layer_groups(windows, context)
    assert [len(group.layers) for group in groups] == sizes
    assert sorted(layer for group in groups for layer in group.layers) == (list(range(len(windows))) if groups else [])
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)


def sequence(token_ids: list[int], salt: str = "") -> Sequence:
    return Sequence(0, array("q", token_ids), SamplingParams(cache_salt=salt), context_length=1000)


class Pool:
    """A block manager driven at random, beside a record of what every block holds: (group, salt, tokens up to its end)."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.block_size = rng.choice([1, 2, 4])
        self.windows = rng.choice([(0,), (0, 5), (5,), (0, 3, 7), (0, 4, 4)])
        self.step_tokens = rng.choice([3, 8])
        self.blocks = BlockManager(rng.choice([24, 60, 90]), self.block_size, True, self.windows, self.step_tokens)
        self.content: dict[int, object] = {}
        self.sequences: list[Sequence] = []
        self.num_hits = 0

    def act(self) -> None:
        actions = [self.arrive, self.compute, self.compute, self.compute, self.release, self.trim, self.append]
        self.rng.choice(actions)()
        assert self.blocks.check(self.sequences) == []
        taken = self.blocks.num_blocks - self.blocks.num_available
        used = {block for seq in self.sequences for table in seq.block_tables for block in table if block != GONE}
        assert taken == len(used)

    def arrive(self) -> None:
        heads = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 9, 9, 9, 9], [7]]
        tokens = self.rng.choice(heads) + [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 12))]
        seq = sequence(tokens, self.rng.choice(["", "", "other"]))
        found = self.blocks.lookup(seq)
        assert found.num_blocks * self.block_size < len(tokens)
        for group, table in enumerate(found.tables):
            assert len(table) == found.num_blocks
            for index, block in enumerate(table):
                if self.visible(group, index, found.num_blocks * self.block_size):
                    assert self.content[block] == self.expected(seq, group, index), "a hit on something else"
                else:
                    assert block == GONE
        self.blocks.share(seq, found)
        self.num_hits += bool(found.num_blocks)
        self.sequences.append(seq)

    def visible(self, group: int, index: int, position: int) -> bool:
        window = self.windows[group]
        return not window or (index + 1) * self.block_size > position - window + 1

    def expected(self, seq: Sequence, group: int, index: int) -> object:
        return group, seq.salt, tuple(seq.token_ids[: (index + 1) * self.block_size])

    def compute(self) -> None:
        if not self.sequences:
            return
        seq = self.rng.choice(self.sequences)
        count = min(self.rng.randrange(1, self.step_tokens + 1), len(seq.token_ids) - seq.num_computed)
        missing = self.blocks.blocks_for(seq.num_computed + count) - seq.num_blocks
        if not self.blocks.grow(seq, seq.num_computed + count):
            assert missing * len(self.windows) > self.blocks.num_available
            self.blocks.release(seq, forget=self.rng.random() < 0.2)
            self.sequences.remove(seq)
            return
        seq.num_computed += count
        for group, table in enumerate(seq.block_tables):
            for index in range((seq.num_computed - count) // self.block_size, seq.num_computed // self.block_size):
                self.content[table[index]] = self.expected(seq, group, index)
        self.blocks.register(seq)
        for group, table in enumerate(seq.block_tables):
            assert all((block != GONE) == self.visible(group, i, seq.num_computed) for i, block in enumerate(table))

    def release(self) -> None:
        if self.sequences and self.rng.random() < 0.5:
            seq = self.sequences.pop(self.rng.randrange(len(self.sequences)))
            self.blocks.release(seq)

    def trim(self) -> None:
        """As speculation does: room for more tokens than are kept."""
        if self.sequences:
            seq = self.rng.choice(self.sequences)
            if self.blocks.grow(seq, seq.num_computed + 5):
                self.blocks.trim(seq, seq.num_computed + self.rng.randrange(3))

    def append(self) -> None:
        if self.sequences:
            self.rng.choice(self.sequences).token_ids.append(self.rng.randrange(3))


def test_books_stay_right_whatever_is_done() -> None:
    hits = 0
    for seed in range(60):
        pool = Pool(random.Random(seed))
        for _ in range(150):
            pool.act()
        for seq in pool.sequences:
            pool.blocks.release(seq)
        assert pool.blocks.num_available == pool.blocks.num_blocks and pool.blocks.check([]) == []
        hits += pool.num_hits
    assert hits > 500


def test_a_windowed_group_holds_its_window_only() -> None:
    blocks = BlockManager(200, 4, True, (0, 6), 8)
    seq = sequence([1] * 100)
    for computed in range(8, 101, 4):
        assert blocks.grow(seq, computed)
        seq.num_computed = computed
        blocks.register(seq)
        held = [sum(block != GONE for block in table) for table in seq.block_tables]
        assert held == [computed // 4, 2], "two blocks hold the five tokens that the next one sees"
    assert blocks.max_tokens(1000) == 780, "195 blocks and the windowed group's five"


def test_a_hit_needs_the_window_before_it() -> None:
    blocks = BlockManager(100, 2, True, (0, 5), 4)
    seq = sequence(list(range(20)))
    for computed in range(4, 21, 4):
        assert blocks.grow(seq, computed)
        seq.num_computed = computed
        blocks.register(seq)
    blocks.release(seq)
    found = blocks.lookup(sequence(list(range(20))))
    assert found.num_blocks == 9 and list(found.tables[1]).count(GONE) == 7
    digest = blocks.hash(seq, 7)
    blocks._forget(blocks._block_of[1][digest])
    found = blocks.lookup(sequence(list(range(20))))
    assert found.num_blocks == 7, "without block 7 of the window, 8 and 9 have no past to see"


@pytest.mark.parametrize("num_blocks", [40, 64, 400])
@pytest.mark.parametrize("budget", [3, 8, 64])
def test_groups_do_not_show(num_blocks: int, budget: int) -> None:
    """32 requests, greedy and seeded, with shared heads, in a pool that forces preemption: as each alone."""
    run = Run(groups=GROUPS, num_blocks=num_blocks, max_batch_tokens=budget, max_num_seqs=8, context_length=60)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10][: 4 + i % 7] + [i] * (i % 5) for i in range(32)]
    params = [{"max_tokens": 12, "temperature": (i % 2) * 1.0, "seed": i} for i in range(32)]
    for i, prompt in enumerate(prompts):
        run.add(i, prompt, **params[i])
    answers = run.drain()
    for i, prompt in enumerate(prompts):
        assert answers[i].tokens == alone(prompt, **params[i]).tokens
    if num_blocks == 40:
        assert run.engine.stats().num_preemptions > 0
    assert run.engine.stats().prefix_hit_tokens > 0


def test_a_long_context_fits_because_windows_give_back() -> None:
    blocks = blocks_of(120, (0, WINDOW), 4, 8)
    run = Run(groups=GROUPS, num_blocks=blocks + 8, max_batch_tokens=8, max_num_seqs=4, context_length=120)
    assert blocks + 8 < 2 * 30
    prompt = [i % 50 for i in range(100)]
    assert run.one(prompt, max_tokens=15).tokens == alone(prompt, max_tokens=15).tokens
    again = run.one(prompt, max_tokens=15)
    assert again.finish is not None and again.finish.cached_tokens == 96
    assert run.engine.stats().num_preemptions == 0


def test_salts_share_nothing() -> None:
    run = Run(FakeModel())
    prompt = list(range(20))
    cached = []
    for salt in ("", "a", "b", "a", ""):
        finish = run.one(prompt, max_tokens=1, cache_salt=salt).finish
        assert finish is not None
        cached.append(finish.cached_tokens)
    assert cached == [0, 0, 0, 16, 16]
