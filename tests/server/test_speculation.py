"""Speculation through the API: the option, the counts in the answer, and the same text with it as without."""

from __future__ import annotations

from pathlib import Path

import ollama
import pytest

from tests.lifecycle.fakes import write_model
from tests.server.daemon import Daemon

PROMPT = "Repeat this line ten times: the cat sat on the mat.\n" + "the cat sat on the mat.\n" * 3


def test_guesses_show_in_the_answer_and_do_not_change_it(daemon: Daemon) -> None:
    asked = {"model": "smollm2", "prompt": PROMPT, "raw": True, "stream": False}
    options = {"temperature": 0.9, "seed": 7, "num_predict": 60, "top_k": 1}
    off = daemon.post("/api/generate", {**asked, "options": {**options, "speculation": "off"}}).json()
    on = daemon.post("/api/generate", {**asked, "options": options}).json()
    assert on["response"] == off["response"] and on["eval_count"] == off["eval_count"]
    assert "draft_count" not in off and on["draft_count"] >= on["draft_accepted_count"] > 0
    cut = daemon.post("/api/generate", {**asked, "options": {**options, "stop": [on["response"][-9:]]}}).json()
    assert cut["done_reason"] == "stop" and cut["draft_count"] >= cut["draft_accepted_count"] > 0, "ended by its stop string"
    none = daemon.post("/api/generate", {**asked, "options": {**options, "draft_num_predict": 0}}).json()
    assert none["response"] == off["response"] and "draft_count" not in none


def test_an_unknown_way_is_refused(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="must be one of auto, ngram, draft, off") as caught:
        client.generate("smollm2", "x", options={"speculation": "sometimes"})
    assert caught.value.status_code == 400


def test_a_draft_model(daemon: Daemon, client: ollama.Client, smollm2_path: Path, tmp_path: Path) -> None:
    """SmolLM2 drafts for itself, so nearly all it says comes true; a draft model of other tokens is a 400 that says so."""
    digest = client.create_blob(smollm2_path)
    made = daemon.post(
        "/api/create", {"model": "drafted", "from": "smollm2", "draft_files": {"d.gguf": digest}, "stream": False}
    )
    assert made.status_code == 200, made.text
    asked = {"prompt": "The capital of France", "raw": True, "stream": False}
    for options in ({"temperature": 0.0, "num_predict": 40}, {"temperature": 1.0, "seed": 3, "num_predict": 40}):
        plain = daemon.post("/api/generate", {**asked, "model": "smollm2", "options": {**options, "speculation": "off"}}).json()
        drafted = daemon.post(
            "/api/generate", {**asked, "model": "drafted", "options": {**options, "speculation": "draft"}}
        ).json()
        assert drafted["response"] == plain["response"]
        assert drafted.get("draft_accepted_count", 0) == drafted.get("draft_count", 0)
    other = client.create_blob(write_model(tmp_path / "other.gguf"))
    daemon.post("/api/create", {"model": "misfit", "from": "smollm2", "draft_files": {"d.gguf": other}, "stream": False})
    refused = daemon.post("/api/generate", {**asked, "model": "misfit"})
    assert refused.status_code == 400 and "tokens and the model 49152" in refused.json()["error"], refused.text
    for name in ("drafted", "misfit"):
        daemon.post("/api/generate", {"model": name, "keep_alive": 0})
