"""Models made with ADAPTER: each answers with its own adapter, all from one engine process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ollama
import torch

from tests.models.tiny import write_tensors
from tests.server.daemon import Daemon


def write_adapter(path: Path, seed: int, architecture: str = "llama", length: int = 576) -> Path:
    """Rank 8, on two matrices of SmolLM2; loud enough to be heard."""
    generator = torch.Generator().manual_seed(seed)
    metadata: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    metadata["general.architecture"] = architecture
    tensors = {}
    for name in ("blk.3.attn_q.weight", "blk.5.attn_output.weight"):
        tensors[f"{name}.lora_a"] = torch.randn(8, length, generator=generator) * 0.2
        tensors[f"{name}.lora_b"] = torch.randn(length, 8, generator=generator) * 0.2
    write_tensors(path, metadata, tensors)
    return path


def create(daemon: Daemon, client: ollama.Client, name: str, adapter: Path) -> None:
    digest = client.create_blob(adapter)
    body = {"model": name, "from": "smollm2", "adapters": {"adapter.gguf": digest}, "stream": False}
    made = daemon.post("/api/create", body)
    assert made.status_code == 200, made.text


def test_models_that_differ_in_their_adapter_share_an_engine(daemon: Daemon, client: ollama.Client, tmp_path: Path) -> None:
    for name, seed in (("adapted-one", 1), ("adapted-two", 2)):
        create(daemon, client, name, write_adapter(tmp_path / f"{name}.gguf", seed))
    names = ["smollm2", "adapted-one", "adapted-two"]
    options = {"temperature": 0.0, "num_predict": 24}

    def ask(name: str) -> str:
        asked = {"model": name, "prompt": "The capital of France", "raw": True, "stream": False, "options": options}
        answer = daemon.post("/api/generate", asked)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["response"])

    ask(names[0])
    size = daemon.get("/api/ps")["models"][0]["size"]
    alone = [ask(name) for name in names]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, names * 4)) == alone * 4
    rows = daemon.get("/api/ps")["models"]
    assert len(rows) == 1, "one engine serves the three"
    assert rows[0]["size"] - size == 2 * 4 * 4 * 32 * 576, "two adapters of four float32 matrices, rank 8 filled up to 32"


def test_an_adapter_that_does_not_fit_is_a_400_that_names_why(daemon: Daemon, client: ollama.Client, tmp_path: Path) -> None:
    create(daemon, client, "adapted-gemma", write_adapter(tmp_path / "gemma.gguf", 3, architecture="gemma2"))
    create(daemon, client, "adapted-wide", write_adapter(tmp_path / "wide.gguf", 3, length=640))
    for name, error in (
        ("adapted-gemma", "for the architecture gemma2, the model is llama"),
        ("adapted-wide", "blk.3.attn_q.weight (lora_a (8, 640), lora_b (640, 8) for a matrix (576, 576))"),
    ):
        answer = daemon.post("/api/generate", {"model": name, "prompt": "x", "stream": False})
        assert answer.status_code == 400 and error in answer.json()["error"], answer.text
    asked = daemon.post("/api/embed", {"model": "adapted-wide", "input": "x"})
    assert asked.status_code == 501 and "adapters" in asked.json()["error"], asked.text
