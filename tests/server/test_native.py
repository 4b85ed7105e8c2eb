"""The official `ollama` client against a real daemon with a real model."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import ollama
import pytest

from tests.server.daemon import Daemon

MODEL = "smollm2"
SKY = [{"role": "user", "content": "Why is the sky blue?"}]
GREEDY = {"temperature": 0, "num_predict": 6}


def test_create_by_blobs_says_what_it_does(client: ollama.Client, smollm2_path: Path) -> None:
    digest = client.create_blob(smollm2_path)  # it is there: the body is not read again
    lines = [line.status for line in client.create("made", files={"m.gguf": digest}, system="Be brief.", stream=True)]
    assert lines[0] == "parsing GGUF" and lines[-2:] == ["writing manifest", "success"]
    assert (
        client.create("made2", from_="made", parameters={"stop": ["x"], "temperature": 0.5}, stream=False).status == "success"
    )
    shown = client.show("made2")
    assert shown.modelfile is not None and "PARAMETER stop x" in shown.modelfile and "SYSTEM Be brief." in shown.modelfile
    assert shown.parameters is not None and f'{"stop":<30} "x"' in shown.parameters.splitlines()
    assert f"{'temperature':<30} 0.5" in shown.parameters.splitlines()
    client.delete("made")
    client.delete("made2")
    assert MODEL + ":latest" in [model.model for model in client.list().models]


def test_list(client: ollama.Client) -> None:
    (model,) = [model for model in client.list().models if model.model == "smollm2:latest"]
    assert model.digest is not None and len(model.digest) == 64
    assert model.size is not None and model.size > 90_000_000
    assert model.modified_at is not None and (datetime.now(UTC) - model.modified_at).total_seconds() < 3600
    details = model.details
    assert details is not None
    assert (details.format, details.family, details.families) == ("gguf", "llama", ["llama"])
    assert (details.parameter_size, details.quantization_level) == ("134.52M", "Q4_1")


def test_show(client: ollama.Client, daemon: Daemon) -> None:
    shown = client.show(MODEL)
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama" and shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["general.parameter_count"] == 134_515_008
    assert "tokenizer.chat_template" not in shown.modelinfo and shown.modelinfo["tokenizer.ggml.tokens"] == []
    assert shown.template is not None and "<|im_start|>" in shown.template
    assert shown.capabilities == ["completion"]
    body = daemon.post("/api/show", {"name": MODEL, "verbose": True}).json()
    assert len(body["model_info"]["tokenizer.ggml.tokens"]) == 49152
    tensors = {tensor["name"]: tensor for tensor in body["tensors"]}
    assert tensors["token_embd.weight"]["shape"] == [576, 49152]
    assert tensors["blk.0.attn_q.weight"]["type"] == "Q4_1" and tensors["output_norm.weight"]["type"] == "F32"
    copilot = daemon.post("/api/show", {"model": MODEL}, headers={"User-Agent": "GitHubCopilotChat/1"}).json()
    assert copilot["model_info"]["general.basename"] == MODEL


def test_generate(client: ollama.Client) -> None:
    whole = client.generate(MODEL, "Why is the sky blue?", options=GREEDY)
    assert (whole.model, whole.done, whole.done_reason) == (MODEL, True, "length")
    assert whole.prompt_eval_count == 36 and whole.eval_count == 6
    assert min(whole.total_duration or 0, whole.prompt_eval_duration or 0, whole.eval_duration or 0) > 0
    assert (whole.total_duration or 0) >= (whole.load_duration or 0) + (whole.eval_duration or 0)
    assert whole.context is not None and len(whole.context) == 42
    lines = list(client.generate(MODEL, "Why is the sky blue?", stream=True, options=GREEDY))
    assert [line.model for line in lines] == [MODEL] * len(lines) and 2 <= len(lines) <= 7  # late tokens share a line
    assert "".join(line.response for line in lines) == whole.response and lines[-1].response == ""
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(line.eval_count is None and line.context is None for line in lines[:-1])
    assert lines[-1].context == whole.context and lines[-1].eval_count == 6


def test_generate_is_chat_with_one_message(client: ollama.Client, daemon: Daemon) -> None:
    """The same prompt, and the model's answer goes on from `context`."""
    text = client.generate(MODEL, SKY[0]["content"], options=GREEDY).response
    assert client.chat(MODEL, SKY, options=GREEDY).message.content == text
    first = client.generate(MODEL, "My name is Ada.", options={"temperature": 0, "num_predict": 12})
    second = {"model": MODEL, "prompt": "And mine?", "context": first.context, "stream": False, "_debug_render_only": True}
    rendered = daemon.post("/api/generate", second).json()["_debug_info"]["rendered_template"]
    before, _, after = rendered.partition(first.response)
    assert "My name is Ada.<|im_end|>" in before and "And mine?<|im_end|>" in after


def test_raw_system_and_template(client: ollama.Client, daemon: Daemon) -> None:
    raw = client.generate(MODEL, "The capital of France is", raw=True, options=GREEDY)
    assert raw.prompt_eval_count == 5 and raw.context is None and "Paris" in raw.response

    def rendered(**fields: object) -> str:
        body = {"model": MODEL, "prompt": "Hi", "stream": False, "_debug_render_only": True, **fields}
        return str(daemon.post("/api/generate", body).json()["_debug_info"]["rendered_template"])

    assert rendered(system="Be odd.") == (
        "<|im_start|>system\nBe odd.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(template="[{{ .System }}|{{ .Prompt }}]", system="S") == "[S|Hi]"
    assert rendered(raw=True) == "Hi"
    chat = daemon.post("/api/chat", {"model": MODEL, "messages": SKY, "stream": False, "_debug_render_only": True}).json()[
        "_debug_info"
    ]["rendered_template"]
    assert chat == rendered(prompt=SKY[0]["content"])


def test_chat(client: ollama.Client) -> None:
    whole = client.chat(MODEL, SKY, options=GREEDY)
    assert whole.message.role == "assistant" and whole.done_reason == "length" and whole.eval_count == 6
    lines = list(client.chat(MODEL, SKY, stream=True, options=GREEDY))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert all(line.message.role == "assistant" for line in lines)
    stopped = client.chat(MODEL, [{"role": "user", "content": "Hi"}], options={"temperature": 0, "num_predict": 40})
    assert stopped.done_reason == "stop" and stopped.message.content == "Hello! How can I assist you today?"


def test_stop_strings_cut_the_text(client: ollama.Client, daemon: Daemon) -> None:
    text = client.generate(MODEL, "Why is the sky blue?", options=GREEDY).response
    words = text.split(" ")
    stop = f"{words[2][-2:]} {words[3][:2]}"  # begins in one token and ends in another
    lines = list(client.generate(MODEL, "Why is the sky blue?", stream=True, options={**GREEDY, "stop": [stop]}))
    assert "".join(line.response for line in lines) == text[: text.index(stop)]
    assert lines[-1].done_reason == "stop" and (lines[-1].eval_count or 9) <= 5
    assert (lines[-1].prompt_eval_duration or 0) > 0 and (lines[-1].eval_duration or 0) > 0
    daemon.seconds_until_idle()


def test_seeds(client: ollama.Client) -> None:
    options = {"temperature": 1.5, "num_predict": 8, "seed": 42}
    one, two = (client.generate(MODEL, "A story:", options=options).response for _ in range(2))
    other = client.generate(MODEL, "A story:", options={**options, "seed": 43}).response
    assert one == two != other


def test_logprobs(client: ollama.Client) -> None:
    assert not client.generate(MODEL, "Hi", options=GREEDY).logprobs
    whole = client.chat(MODEL, SKY, options={**GREEDY, "num_predict": 10}, logprobs=True, top_logprobs=3)
    entries = whole.logprobs
    assert entries is not None and len(entries) == whole.eval_count == 10
    assert "".join(entry.token for entry in entries) == whole.message.content
    for entry in entries:
        assert entry.logprob <= 0 and entry.top_logprobs is not None and len(entry.top_logprobs) == 3
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] == entry.logprob  # greedy


def test_logprobs_have_bytes(daemon: Daemon) -> None:
    body = {"model": MODEL, "prompt": "Hi", "stream": False, "logprobs": True, "options": GREEDY}
    for entry in daemon.post("/api/generate", body).json()["logprobs"]:
        assert bytes(entry["bytes"]).decode() == entry["token"] and "top_logprobs" not in entry


def test_embed(client: ollama.Client) -> None:
    one = client.embed(MODEL, "The cat sat on the mat.")
    many = client.embed(MODEL, ["The cat sat on the mat.", "", "Stock markets fell sharply."])
    assert len(many.embeddings) == 3 and len(one.embeddings[0]) == 576
    assert one.prompt_eval_count == 7 and (many.prompt_eval_count or 0) > 7
    for vector in many.embeddings:
        assert math.isclose(math.fsum(x * x for x in vector), 1.0, rel_tol=1e-5)
    assert cosine(one.embeddings[0], many.embeddings[0]) > 0.99999
    cut = client.embed(MODEL, "The cat sat on the mat.", dimensions=64).embeddings[0]
    assert len(cut) == 64 and cosine(cut, one.embeddings[0][:64]) > 0.99999
    assert client.embed(MODEL, "").embeddings == client.embed(MODEL, []).embeddings == []
    old = client.embeddings(MODEL, "The cat sat on the mat.").embedding
    assert cosine(list(old), one.embeddings[0]) > 0.99999
    assert client.embeddings(MODEL, "").embedding == []


def test_embed_truncates_or_refuses(client: ollama.Client, daemon: Daemon) -> None:
    long = "word " * 40
    cut = daemon.post("/api/embed", {"model": MODEL, "input": long, "options": {"num_ctx": 16}})
    body = cut.json()
    assert body["truncated"] and body["prompt_eval_count"] == 16 and body["prompt_tokens_total"] == 41
    assert "truncated" in cut.headers["x-ollamapy-warning"]
    with pytest.raises(ollama.ResponseError, match="the input length exceeds the context length") as error:
        client.embed(MODEL, long, truncate=False, options={"num_ctx": 16})
    assert error.value.status_code == 400


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    )


def test_ps_and_keep_alive(client: ollama.Client, daemon: Daemon) -> None:
    client.generate(MODEL, "", keep_alive=120)
    (model,) = client.ps().models
    assert (model.model, model.size_vram) == ("smollm2:latest", 0) and model.size is not None and model.size > 100_000_000
    assert model.context_length == 4096 and model.expires_at is not None
    assert 110 < (model.expires_at - datetime.now(UTC)).total_seconds() < 121
    client.generate(MODEL, "")  # keeps what holds
    client.chat(MODEL, [], keep_alive=-1)
    (model,) = client.ps().models
    assert model.expires_at is not None and (model.expires_at - datetime.now(UTC)).days > 36500
    done = client.generate(MODEL, "", keep_alive=0)
    assert (done.done_reason, done.response, done.done) == ("unload", "", True)
    assert client.ps().models == [] and daemon.get("/api/ps") == {"models": []}
    loaded = daemon.post("/api/chat", {"model": MODEL, "messages": []}).json()
    assert loaded["done_reason"] == "load" and loaded["message"] == {"role": "assistant", "content": ""}
    client.generate(MODEL, "", keep_alive="5m")


def test_keep_alive_zero_ends_with_the_request(client: ollama.Client) -> None:
    client.generate(MODEL, "Hi", keep_alive=0, options={"num_predict": 2})
    assert client.ps().models == []
    client.generate(MODEL, "", keep_alive="5m")


def test_copy_and_delete(client: ollama.Client) -> None:
    client.copy(MODEL, "someone/copy:v1")
    assert client.chat("SOMEONE/copy:v1", SKY, options={"num_predict": 1}).model == "SOMEONE/copy:v1"
    assert len(client.ps().models) == 1  # the same weights, the same engine
    client.delete("someone/copy:v1")
    assert "someone/copy:v1" not in [model.model for model in client.list().models]
    client.show(MODEL)


def test_a_long_prompt_is_cut_and_the_answer_says_so(client: ollama.Client, daemon: Daemon) -> None:
    body = {"model": MODEL, "prompt": "word " * 100, "stream": False, "options": {**GREEDY, "num_ctx": 64, "num_predict": 2}}
    cut = daemon.post("/api/generate", body)
    said = cut.json()
    assert said["truncated"] and said["prompt_tokens_total"] > 100 and said["prompt_eval_count"] < 64
    assert "tokens were cut" in cut.headers["x-ollamapy-warning"]
    for fields in ({"truncate": False}, {"shift": False}):
        refused = daemon.post("/api/generate", {**body, **fields})
        assert refused.status_code == 400 and "exceeds the available context of 64 tokens" in refused.json()["error"]
    turns = [{"role": "user", "content": "old " * 30}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "Hi"}]
    chat = {"model": MODEL, "messages": turns, "stream": False, "options": body["options"], "_debug_render_only": True}
    rendered = daemon.post("/api/chat", chat).json()["_debug_info"]["rendered_template"]
    assert "old" not in rendered and "Hi<|im_end|>" in rendered


def test_unknown_options_are_a_warning(daemon: Daemon) -> None:
    for stream in (True, False):
        body = {"model": MODEL, "prompt": "Hi", "stream": stream, "options": {"numCtx": 1, "tfs_z": 1, "num_predict": 1}}
        answer = daemon.post("/api/generate", body)
        assert answer.status_code == 200
        assert '"numCtx"' in answer.headers["x-ollamapy-warning"] and '"tfs_z"' in answer.headers["x-ollamapy-warning"]
    assert "x-ollamapy-warning" not in daemon.post("/api/generate", {**body, "options": {"num_predict": 1}}).headers


def test_lines_are_ndjson(daemon: Daemon) -> None:
    answer = daemon.post("/api/generate", {"model": MODEL, "prompt": "Hi", "options": GREEDY})
    assert answer.headers["content-type"] == "application/x-ndjson" and answer.headers["transfer-encoding"] == "chunked"
    lines = [json.loads(line) for line in answer.content.splitlines()]
    assert 2 <= len(lines) <= 7 and all(line["model"] == MODEL for line in lines)
    created = [datetime.fromisoformat(line["created_at"]) for line in lines]
    assert created == sorted(created) and lines[0]["created_at"].endswith("Z")
    assert answer.text.endswith("}\n")
