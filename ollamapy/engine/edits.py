"""What is done to single logits before the filters: biases, penalties, DRY, ids never chosen; packed for one launch.

Knows no grammar: that forbids most of a vocabulary, and is a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine import dry
from ollamapy.engine.sequence import Sequence
from ollamapy.engine.transfer import sent


class Edits(NamedTuple):
    """Of those rows of logits that change: three lists of tokens one after the other, none twice in a list, and ids that get
    minus infinity. All in float32, each step rounded by itself.

    1. biases: x + value; 2. penalties, whose value is how often the token occurs: x * repeat, or x / repeat where x is
    positive, then + (value * -frequency + -presence); 3. DRY: x + value.
    """

    rows: NDArray[np.int32]  # (m,)
    bounds: NDArray[np.int32]  # (m, 4) where in `ids` the lists begin, and where the last one ends
    factors: NDArray[np.float32]  # (m, 3) repeat, -frequency, -presence
    ids: NDArray[np.int32]  # (k,)
    values: NDArray[np.float32]  # (k,)
    spans: NDArray[np.int32]  # (m, 2) where in `never` a row's ids begin and end
    never: Tensor  # (s,) int64, where the logits are


class Editor:
    """Makes them of sequences. Holds the sets of ids that are never chosen on the device: thousands, the same in each step."""

    def __init__(self) -> None:
        self._spans: dict[tuple[int, ...], tuple[int, int]] = {}
        self._never: Tensor | None = None

    def of(self, sequences: ListLike[Sequence], logits: Tensor) -> Edits | None:
        """For logits (n, V); None where no row changes. Waits for no device."""
        rows: list[int] = []
        bounds: list[list[int]] = []
        factors: list[tuple[float, float, float]] = []
        spans: list[tuple[int, int]] = []
        ids: list[int] = []
        values: list[float] = []
        for row, seq in enumerate(sequences):
            p, window = seq.params, seq.penalties
            if window is None and not (p.logit_bias or p.dry_multiplier or p.suppress_ids):
                continue
            found: list[Mapping[int, float]] = [dict(p.logit_bias), {} if window is None else window.counts, dry.penalties(seq)]
            rows.append(row)
            bounds.append([*accumulate(map(len, found), initial=len(ids))])
            for changes in found:
                ids += changes
                values += changes.values()
            factors.append((p.repeat_penalty, -p.frequency_penalty, -p.presence_penalty))
            spans.append(self._span(seq, logits) if p.suppress_ids else (0, 0))
        if not rows:
            return None
        if self._never is None:
            self._never = torch.empty(0, dtype=torch.int64, device=logits.device)
        whole = [np.array(each, dtype=np.int32) for each in (rows, bounds, ids, spans)]
        with np.errstate(over="ignore"):  # a bias of 1e300: the row is not finite then, and fails alone
            real = [np.array(each, dtype=np.float32) for each in (factors, values)]
        return Edits(whole[0], whole[1], real[0], whole[2], real[1], whole[3], self._never)

    def _span(self, seq: Sequence, logits: Tensor) -> tuple[int, int]:
        """Where its ids are in `never`. Looked up once for a sequence: to hash gemma3's 6,242 takes 23 us."""
        if seq.never is None or seq.never[0] is not self:
            ids = seq.params.suppress_ids
            if ids not in self._spans:
                valid = [token_id for token_id in ids if 0 <= token_id < logits.shape[1]]
                new = sent(torch.tensor(valid, dtype=torch.int64), logits.device)
                before = 0 if self._never is None else len(self._never)
                self._never = new if self._never is None else torch.cat((self._never, new))
                self._spans[ids] = before, before + len(valid)
            seq.never = self, *self._spans[ids]
        return seq.never[1:]
