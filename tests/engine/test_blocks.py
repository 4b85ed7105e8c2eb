"""The block pool by itself: hand-out, sharing, eviction order, and that its check sees every kind of wrong book."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from ollamapy.engine.blocks import BlockManager
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sequence import Sequence


def sequence(token_ids: list[int], request_id: int = 0) -> Sequence:
    return Sequence(request_id, array("q", token_ids), SamplingParams(), context_length=1000)


def computed(blocks: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence whose tokens are all in the cache, as after a step."""
    seq = sequence(token_ids)
    blocks.share(seq, blocks.lookup(seq))
    assert blocks.grow(seq, len(token_ids))
    seq.num_computed = len(token_ids)
    blocks.register(seq)
    return seq


def found(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    return list(blocks.lookup(sequence(token_ids)).tables[0])


def test_grow_to_the_edge_of_a_block() -> None:
    blocks = BlockManager(4, 4)
    seq = sequence([1] * 20)
    for tokens, used in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (16, 4)):
        assert blocks.grow(seq, tokens) and seq.num_blocks == used and blocks.num_free == 4 - used
    assert not blocks.grow(seq, 17) and seq.num_blocks == 4
    blocks.release(seq)
    assert blocks.num_free == 4 and blocks.num_cached == 0, "nothing was registered"
    assert blocks.check([seq]) == []


def test_growth_that_fails_changes_nothing() -> None:
    blocks = BlockManager(3, 2)
    first, second = sequence([1] * 4), sequence([2] * 4)
    assert blocks.grow(first, 4)
    assert not blocks.grow(second, 4) and second.num_blocks == 0 and blocks.num_free == 1
    assert blocks.check([first, second]) == []


def test_blocks_of_a_draft_are_not_credited_to_others() -> None:
    blocks = BlockManager(8, 2)
    seq = sequence([1, 2, 3, 4])
    assert blocks.needed(seq) == 2 and blocks.grow(seq, 8)  # with four tokens that were guessed
    assert blocks.needed(seq) == 0, "not -2, which would promise two blocks more than there are"


def test_only_full_blocks_before_the_last_token_are_found() -> None:
    blocks = BlockManager(8, 4)
    seq = computed(blocks, list(range(10)))
    assert found(blocks, list(range(10))) == list(seq.block_tables[0][:2])
    assert found(blocks, list(range(8))) == list(seq.block_tables[0][:1]), "its last token has to be computed"
    assert found(blocks, list(range(9))) == list(seq.block_tables[0][:2])
    assert found(blocks, [0, 1, 2]) == []
    assert found(blocks, [0, 1, 2, 9, 4, 5, 6, 7, 8]) == []
    assert found(blocks, [4, 5, 6, 7, 8]) == [], "the same tokens after another head are another content"


def test_shared_blocks_return_with_their_last_user() -> None:
    blocks = BlockManager(8, 4)
    first = computed(blocks, list(range(9)))
    second = computed(blocks, list(range(9)))
    assert first.block_tables[0][:2] == second.block_tables[0][:2] and first.block_tables[0][2] != second.block_tables[0][2]
    assert blocks.check([first, second]) == []
    blocks.release(first)
    assert (blocks.num_free, blocks.num_cached) == (5, 0)
    blocks.release(second)
    assert (blocks.num_free, blocks.num_cached) == (6, 2)
    assert blocks.check([]) == []


def test_oldest_content_is_evicted_first_and_heads_last() -> None:
    blocks = BlockManager(4, 2)
    for head in (10, 20):
        blocks.release(computed(blocks, [head, head + 1, head + 2, head + 3]))
    assert blocks.num_cached == 4
    big = sequence([1, 1])
    assert blocks.grow(big, 2)
    assert len(found(blocks, [10, 11, 12, 13, 0])) == 1, "the tail of the older one went"
    assert len(found(blocks, [20, 21, 22, 23, 0])) == 2
    blocks.release(big)
    assert blocks.check([]) == []


def test_equal_blocks_computed_side_by_side_are_kept_once() -> None:
    blocks = BlockManager(8, 2)
    first, second = sequence([1, 2, 3]), sequence([1, 2, 3])
    for seq in (first, second):
        assert blocks.grow(seq, 3)
    for seq in (first, second):
        seq.num_computed = 3
        blocks.register(seq)
    blocks.release(first)
    blocks.release(second)
    assert (blocks.num_free, blocks.num_cached) == (7, 1)
    assert blocks.check([]) == []


def test_forgotten_content_is_not_found() -> None:
    blocks = BlockManager(8, 2)
    kept = computed(blocks, [1, 2, 3])
    failed = computed(blocks, [1, 2, 3, 4, 5])
    blocks.release(failed, forget=True)
    assert len(found(blocks, [1, 2, 3, 4, 5])) == 1, "what another sequence uses stays"
    blocks.release(kept, forget=True)
    assert (blocks.num_free, blocks.num_cached) == (8, 0)
    assert blocks.check([]) == []


def test_hashes_differ_between_processes() -> None:
    first, second = BlockManager(2, 2), BlockManager(2, 2)
    one, other = computed(first, [1, 2]), computed(second, [1, 2])
    assert one.block_hashes[0] != other.block_hashes[0] and len(one.block_hashes[0]) == 16


def test_hash_covers_large_ids_and_order() -> None:
    blocks = BlockManager(64, 2)
    seen = set()
    for tokens in ([1, 2], [2, 1], [1, 2**33 + 2], [0, 0], [256, 0], [0, 256], [1, 258]):
        seen.add(computed(blocks, tokens).block_hashes[0])
    assert len(seen) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda b, s: b._free.append(b._free[0]),
        lambda b, s: b._free.pop(),
        lambda b, s: b._free.append(s.block_tables[0][0]),
        lambda b, s: b._cached.popitem(),
        lambda b, s: b._references.__setitem__(s.block_tables[0][0], 2),
        lambda b, s: b._references.__setitem__(b._free[0], 1),
        lambda b, s: s.block_tables[0].append(s.block_tables[0][0]),
        lambda b, s: s.block_tables[0].pop(),
        lambda b, s: b._known.__setitem__(b._free[0], (0, b"x")),
        lambda b, s: b._block_of[0].clear(),
        lambda b, s: b._block_of[0].__setitem__(next(iter(b._block_of[0])), b._free[0]),
        lambda b, s: b._known.__setitem__(next(iter(b._cached)), None),
    ],
)
def test_check_sees_damage(damage: Callable[[BlockManager, Sequence], object]) -> None:
    blocks = BlockManager(10, 2)
    blocks.release(computed(blocks, [7, 8, 9, 10]))
    seq = computed(blocks, [1, 2, 3])
    assert blocks.check([seq]) == []
    damage(blocks, seq)
    assert blocks.check([seq]) != []
