"""Speculation through the API: the option, the counts in the answer, and the same text with it as without."""

from __future__ import annotations

import ollama
import pytest

from tests.server.daemon import Daemon

PROMPT = "Repeat this line ten times: the cat sat on the mat.\n" + "the cat sat on the mat.\n" * 3


def test_guesses_show_in_the_answer_and_do_not_change_it(daemon: Daemon) -> None:
    asked = {"model": "smollm2", "prompt": PROMPT, "raw": True, "stream": False}
    options = {"temperature": 0.9, "seed": 7, "num_predict": 60, "top_k": 1}
    off = daemon.post("/api/generate", {**asked, "options": {**options, "speculation": "off"}}).json()
    on = daemon.post("/api/generate", {**asked, "options": options}).json()
    assert on["response"] == off["response"] and on["eval_count"] == off["eval_count"]
    assert "draft_count" not in off and on["draft_count"] >= on["draft_accepted_count"] > 0
    none = daemon.post("/api/generate", {**asked, "options": {**options, "draft_num_predict": 0}}).json()
    assert none["response"] == off["response"] and "draft_count" not in none


def test_an_unknown_way_is_refused(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="must be one of auto, ngram, draft, off") as caught:
        client.generate("smollm2", "x", options={"speculation": "sometimes"})
    assert caught.value.status_code == 400
