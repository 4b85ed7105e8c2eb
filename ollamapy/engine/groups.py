"""Which layers share block tables. Layers with a window give the blocks behind it back, so they have tables of their own.

All groups take their blocks from one pool: a block id is a place in `size` caches, and the n-th layer of every group uses the
n-th cache. So memory goes to whichever group needs it, and a block has one size. Knows no tensor and no sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ollamapy.engine.protocol import LayerGroup

MAX_PADDING = 0.1  # of the caches: layers that the last group of a kind lacks


def layer_groups(windows: Sequence[int], context_length: int) -> tuple[LayerGroup, ...]:
    """Groups for layers with these windows (0: none) and equal heads. Empty when all may share one table: where no layer
    has a window that a sequence can outgrow.

    The size of a group is the largest that leaves at most MAX_PADDING of the caches unused.
    """
    kinds: dict[int, list[int]] = {0: []}
    for layer, window in enumerate(windows):
        kinds.setdefault(window if window < context_length else 0, []).append(layer)
    if len(kinds) == 1:
        return ()
    if not kinds[0]:
        del kinds[0]
    most = min(len(layers) for layers in kinds.values())
    size = next(size for size in range(most, 0, -1) if _padded(kinds.values(), size) <= (1 + MAX_PADDING) * len(windows))
    return tuple(
        LayerGroup(window, tuple(layers[start : start + size]))
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    )


def _padded(kinds: Collection[list[int]], size: int) -> int:
    return sum(-(-len(layers) // size) * size for layers in kinds)


def group_size(groups: Sequence[LayerGroup], num_layers: int) -> int:
    """Layers whose keys and values one block id holds."""
    return max((len(group.layers) for group in groups), default=num_layers)


def most_blocks(window: int, block_size: int, step_tokens: int) -> int:
    """Blocks that one sequence holds at most for layers with a window, in a step of `step_tokens`."""
    return -(-(window - 1 + step_tokens) // block_size) + 1


def most_tokens(limit: int, num_blocks: int, windows: Sequence[int], block_size: int, step_tokens: int) -> int:
    """Tokens, at most `limit`, of a sequence that can be run when it has a pool of `num_blocks` to itself."""
    while limit > 0 and blocks_of(limit, windows, block_size, step_tokens) > num_blocks:
        limit = (limit - 1) // block_size * block_size
    return limit


def blocks_of(num_tokens: int, windows: Sequence[int], block_size: int, step_tokens: int) -> int:
    """Blocks that one sequence of `num_tokens` holds at most, all groups together; a window of 0 is none."""
    full = -(-num_tokens // block_size)
    return sum(min(full, most_blocks(window, block_size, step_tokens)) if window else full for window in windows)
