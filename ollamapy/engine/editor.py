"""Editor: from sequences to what is to be done to single logits of theirs. Knows no grammar, which is a mask."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ollamapy.engine import dry
from ollamapy.engine.edits import Edits
from ollamapy.engine.sequence import Sequence
from ollamapy.engine.transfer import sent


class Editor:
    """Makes `Edits`. Holds the sets of ids that are never chosen on the device: thousands, the same in each step."""

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
