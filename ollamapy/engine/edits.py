"""What is done to single logits before the filters: biases, penalties, DRY, ids never chosen; packed for one launch.

Knows no sequence (`editor` makes them) and no grammar: that forbids most of a vocabulary, and is a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


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
