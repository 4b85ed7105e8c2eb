"""The real files against golden float32 results: the likeliest next tokens at hundreds of positions, greedy continuations,
and the promise that a sequence's result does not depend on its batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ollamapy.gguf.reader import GGUFFile
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model
from tests.conftest import DATA, golden
from tests.models.paged import Paged

MEAN_KL = 1e-5  # observed: 9e-12 and 5e-12; llama.cpp's own distance is 3e-3 and 5e-3
SURE = 0.01  # margins below it are decided by rounding


def _load(path: Path) -> Decoder:
    with GGUFFile.open(path) as file:
        return load_model(file, torch.device("cpu"), kernels="reference")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Decoder:
    return _load(smollm2_path)


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Decoder:
    return _load(gemma3_path)


def kl_to_golden(logits: Tensor, ids: Tensor, expected: Tensor) -> Tensor:
    """KL(golden || ours) of each row (n, V) over the 64 likeliest tokens `ids` (n, 64) and one bucket for the rest."""
    # float32, as the golden log-probabilities were made: their sum's rounding alone is a KL of 5e-9 to float64.
    got = logits.log_softmax(-1).gather(1, ids).double()
    rest, got_rest = ((1.0 - values.exp().sum(1)).clamp(min=1e-12) for values in (expected, got))
    return (expected.exp() * (expected - got)).sum(1) + rest * (rest / got_rest).log()


def _check_kl(model: Decoder, name: str, every: int) -> None:
    """`every`: the whole text is run, but logits are compared at every n-th position."""
    with np.load(DATA / f"{name}.npz") as data:
        ids = data["ids"].tolist()
        top = torch.from_numpy(data["top_ids"]).long()[::every]
        expected = torch.from_numpy(data["top_logprobs"]).double()[::every]
    paged = Paged(model, num_blocks=64)
    hidden = torch.cat([paged.run({"text": ids[:300]})["text"], paged.run({"text": ids[300:]})["text"]])[::every]
    kls, right = [], 0
    for start in range(0, len(top), 64):
        part = slice(start, start + 64)
        logits = model.logits(hidden[part])
        kls.append(kl_to_golden(logits, top[part], expected[part]))
        right += int((logits.argmax(1) == top[part, 0]).sum())
    kl, top1 = torch.cat(kls), right / len(top)
    print(f"{name}: mean KL {kl.mean():.1e}, max {kl.max():.1e}, top-1 {top1:.4f} at {len(top)} positions")
    assert kl.mean() <= MEAN_KL
    assert top1 == 1.0


def _check_greedy(model: Decoder, name: str) -> None:
    """All prompts at once, as a server would run them."""
    cases = golden(name)["greedy"]
    paged = Paged(model, num_blocks=128)
    feed = {str(i): case["prompt_ids"] for i, case in enumerate(cases)}
    generated: dict[str, list[int]] = {key: [] for key in feed}
    while feed:
        hidden = paged.run(feed)
        logits = model.logits(torch.cat([rows[-1:] for rows in hidden.values()]))
        for key, token in zip(hidden, logits.argmax(-1).tolist(), strict=True):
            generated[key].append(token)
        feed = {key: [ids[-1]] for key, ids in generated.items() if len(ids) < len(cases[int(key)]["ids"])}
    sure_steps = 0
    for key, case in enumerate(cases):
        unsure = [step for step, margin in enumerate(case["margins"]) if margin < SURE]
        sure = unsure[0] if unsure else len(case["ids"])
        assert generated[str(key)][:sure] == case["ids"][:sure], case["prompt"]
        sure_steps += sure
    total = sum(len(case["ids"]) for case in cases)
    equal = sum(generated[str(key)] == case["ids"] for key, case in enumerate(cases))
    print(f"{name}: greedy equal for {sure_steps} sure steps of {total}; {equal} of {len(cases)} continuations whole")
    assert sure_steps > total // 2


def test_smollm2_distribution(smollm2: Decoder) -> None:
    _check_kl(smollm2, "smollm2-135m", every=1)


def test_gemma3_distribution(gemma3: Decoder) -> None:
    """Every position of the text goes through the layers; of 262,144 logits each, a fifth is made (20 s for all)."""
    _check_kl(gemma3, "gemma3-270m", every=5)


@pytest.mark.slow
def test_gemma3_distribution_at_every_position(gemma3: Decoder) -> None:
    _check_kl(gemma3, "gemma3-270m", every=1)


def test_smollm2_greedy(smollm2: Decoder) -> None:
    _check_greedy(smollm2, "smollm2-135m")


def test_gemma3_greedy(gemma3: Decoder) -> None:
    _check_greedy(gemma3, "gemma3-270m")


def test_batch_does_not_change_a_bit(smollm2: Decoder) -> None:
    """Eight sequences in mixed chunks, with f16 keys and values: each row as when its sequence runs alone, whole."""
    lengths = [1, 3, 17, 40, 129, 64, 7, 150]
    texts = {
        str(i): torch.randint(0, 49152, (n,), generator=torch.Generator().manual_seed(i)).tolist()
        for i, n in enumerate(lengths)
    }
    alone = {key: Paged(smollm2, dtype=torch.float16).run({key: ids})[key] for key, ids in texts.items()}
    together = Paged(smollm2, dtype=torch.float16, seed=1)
    parts: dict[str, list[Tensor]] = {key: [] for key in texts}
    cut = {key: max(len(ids) * 2 // 3, 1) for key, ids in texts.items()}
    first = together.run({key: ids[: cut[key]] for key, ids in texts.items()})
    rest = {key: ids[cut[key] :] for key, ids in texts.items() if len(ids) > cut[key]}
    second = together.run({key: ids[:1] for key, ids in rest.items()})  # one row each: decoded together
    third = together.run({key: ids[1:] for key, ids in rest.items() if len(ids) > 1})
    for rows in (first, second, third):
        for key, hidden in rows.items():
            parts[key].append(hidden)
    for key in texts:
        assert torch.equal(torch.cat(parts[key]), alone[key]), key
    row = alone["7"][-1:]
    assert torch.equal(smollm2.logits(alone["7"])[-1:], smollm2.logits(row))
