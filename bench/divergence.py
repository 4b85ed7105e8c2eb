"""Mean KL of a loaded model to golden float32 results, by the tests' own arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from ollamapy.models.decoder import Decoder
from tests.conftest import DATA
from tests.models.paged import Paged
from tests.models.test_golden import kl_to_golden

ROWS = 64  # whose logits are held at once
CHUNK = 256  # tokens of a prefill step


def mean_kl(model: Decoder, name: str) -> float:
    """Over every position of the golden text; keys and values in float16, as the engine keeps them."""
    with np.load(DATA / f"{name}.npz") as data:
        ids = data["ids"].tolist()
        top = torch.from_numpy(data["top_ids"]).long()
        expected = torch.from_numpy(data["top_logprobs"]).double()
    paged = Paged(model, num_blocks=len(ids) // 16 + 2, dtype=torch.float16)
    hidden = torch.cat([paged.run({"text": ids[start : start + CHUNK]})["text"] for start in range(0, len(ids), CHUNK)])
    parts = [slice(start, start + ROWS) for start in range(0, len(top), ROWS)]
    return float(torch.cat([kl_to_golden(model.logits(hidden[part]), top[part], expected[part]) for part in parts]).mean())
