"""Changes of single logits, bit for bit what a loop over their definition gives; ids that are never chosen are sent once."""

from __future__ import annotations

import math
import random
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ollamapy import ops
from ollamapy.engine import dry
from ollamapy.engine.editor import Editor
from ollamapy.engine.edits import Edits
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sequence import Sequence

SETS = [(), (), (1, 2, 3, 10**6, -1), tuple(range(0, 40, 3))]


def some_sequences(rng: random.Random, count: int, size: int) -> list[Sequence]:
    """Few tokens, so that lists meet; some of them change nothing."""

    def sequence() -> Sequence:
        prompt = array("q", [rng.randrange(min(size, 9)) for _ in range(rng.choice([1, 30, 300]))])
        biased = rng.sample(range(min(size, 12)), min(size, rng.choice([0, 0, 1, 5])))
        params = SamplingParams(
            repeat_last_n=rng.choice([64, 0, 7, -1]),
            repeat_penalty=rng.choice([1.0, 1.1, 0.7, 3.0]),
            frequency_penalty=rng.choice([0.0, 0.3, -0.1]),
            presence_penalty=rng.choice([0.0, 0.7]),
            logit_bias=tuple((token_id, rng.choice([0.1, -100.0, 7.3])) for token_id in biased),
            dry_multiplier=rng.choice([0.0, 0.8]),
            suppress_ids=rng.choice(SETS),
        )
        return Sequence(0, prompt, params, 4096)

    plain = Sequence(0, array("q", [1]), SamplingParams(), 4096)
    return [plain if rng.random() < 0.2 else sequence() for _ in range(count)]


def awkward_logits(rng: random.Random, count: int, size: int) -> torch.Tensor:
    """With equals, zeros of both signs, and numbers that are none, among the tokens that change."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    logits = (4 * torch.randn(count, size, generator=generator)).round() / 3
    for row in logits:
        row[rng.randrange(min(size, 9))] = rng.choice([math.inf, -math.inf, math.nan, -0.0, 1e-42, 3e38])
    return logits


def by_definition(row: NDArray[np.float32], seq: Sequence) -> None:
    p, float32 = seq.params, np.float32
    with np.errstate(all="ignore"):
        for token, bias in dict(p.logit_bias).items():
            row[token] += float32(bias)
        for token, count in ({} if seq.penalties is None else seq.penalties.counts).items():
            x = row[token]
            x = x * float32(p.repeat_penalty) if x <= 0 else x / float32(p.repeat_penalty)
            row[token] = x - (float32(count) * float32(p.frequency_penalty) + float32(p.presence_penalty))
        for token, change in dry.penalties(seq).items():
            row[token] += float32(change)
    for token in p.suppress_ids:
        if 0 <= token < len(row):
            row[token] = -math.inf


@pytest.mark.parametrize(("count", "size"), [(1, 40), (2, 5), (33, 1000)])
@pytest.mark.parametrize("seed", range(4))
def test_bit_for_bit_the_definition(seed: int, count: int, size: int) -> None:
    rng = random.Random(seed)
    sequences, logits = some_sequences(rng, count, size), awkward_logits(rng, count, size)
    want = logits.numpy().copy()
    for row, seq in zip(want, sequences, strict=True):
        by_definition(row, seq)
    edits = Editor().of(sequences, logits)
    if edits is not None:
        ops.edit(logits, edits)
    np.testing.assert_array_equal(logits.numpy(), want)


def test_rows_that_do_not_change_cost_nothing() -> None:
    logits = torch.randn(2, 50)
    plain, changed = Sequence(0, array("q", [1]), SamplingParams(), 99), penalized(suppress_ids=(7, 9))
    assert Editor().of([plain, plain], logits) is None
    edits = Editor().of([plain, changed], logits)
    assert edits is not None and edits.rows.tolist() == [1] and edits.ids.tolist() == [4, 5]


def test_a_bias_that_float32_cannot_hold() -> None:
    logits = torch.zeros(2, 50)
    edits = Editor().of([penalized(logit_bias=((1, 1e300),)), penalized()], logits)
    assert edits is not None
    ops.edit(logits, edits)
    assert logits[0, 1] == math.inf and logits[1].isfinite().all()


def penalized(**params: Any) -> Sequence:
    return Sequence(0, array("q", [4, 5, 4]), SamplingParams(repeat_penalty=1.1, **params), 99)


def test_ids_never_chosen_are_sent_once() -> None:
    editor, logits = Editor(), torch.randn(3, 50)
    one, two = penalized(suppress_ids=(7, 9, 99)), penalized(suppress_ids=(3,))

    def of(*sequences: Sequence) -> Edits:
        edits = editor.of(sequences, logits)
        assert edits is not None
        return edits

    first = of(one, penalized())
    assert first.spans.tolist() == [[0, 2], [0, 0]] and first.never.tolist() == [7, 9]
    assert of(one, penalized(suppress_ids=(7, 9, 99))).never is first.never, "another request's, of the same ids"
    both = of(two, one, two)
    assert both.spans.tolist() == [[2, 3], [0, 2], [2, 3]] and both.never.tolist() == [7, 9, 3]
    assert of(two).never is both.never
    other = Editor().of([two], logits)
    assert other is not None and other.spans.tolist() == [[0, 1]] and other.never.tolist() == [3]
