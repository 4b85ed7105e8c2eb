"""Grammars in the engine: nothing but what they allow comes out, whatever else runs, and nothing else changes."""

from __future__ import annotations

import json
import re
import string
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from ollamapy.engine.grammar import Grammar, Vocabulary
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.sampler import constrain
from ollamapy.errors import EngineError
from tests.engine.fake import VOCAB, Answer, Run, alone

EOS, SHADOW, CONTROL = 95, 94, 93  # the end; the end of a turn, spelled like ordinary text; a control token
WORDS = [b"yes", b"no", b'":', b'{"', b'"}', b'", "', b"tru", "é".encode(), "é".encode()[:1], b"  ", b"\n"]
TOKENS = [bytes([byte]) for byte in b' {}[]":,-.' + b"0123456789" + string.ascii_letters.encode()] + WORDS
TOKENS += [b""] * (93 - len(TOKENS)) + [b"<ctl>", b"a", b"</s>"]
PAIRS = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99}, "maxProperties": 4}
OBJECT = {
    "type": "object",
    "properties": {"a": {"enum": ["X", "YES"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def vocabulary() -> Vocabulary:
    """One token less than the model has rows: the last row has no token."""
    assert len(TOKENS) == VOCAB - 1
    return Vocabulary(TOKENS, [CONTROL, SHADOW, EOS], [SHADOW, EOS])


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f'%llguidance {{"no_forcing": true}}\n{text}'}]})


def schema(value: object) -> str:
    answer = {"name": "answer", "json_schema": value}
    return json.dumps({"grammars": [{"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @answer'}, answer]})


def engine(**plan: object) -> Run:
    run = Run(**plan)
    run.engine.arrivals.grammars = Grammars(vocabulary)
    return run


def one(prompt: list[int], grammar: str, plan: dict[str, object] | None = None, **params: object) -> Answer:
    settings: dict[str, object] = {"num_blocks": 256, "max_num_seqs": 1, "prefix_cache": False, **(plan or {})}
    return engine(**settings).one(prompt, grammar=grammar, stop_ids=(SHADOW, EOS), **params)


def text(answer: Answer) -> str:
    return b"".join(TOKENS[id] for id in answer.tokens).decode()


def reason(answer: Answer) -> str:
    assert answer.finish is not None
    assert answer.finish.reason != "error", answer.finish.error
    return answer.finish.reason


@pytest.mark.parametrize("params", [
    {"temperature": 0.0},
    {"temperature": 0.0, "repeat_penalty": 1.5, "frequency_penalty": 2.0},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 90, "typical_p": 0.5, "top_p": 1.0},
    {"temperature": 1.0, "suppress_ids": (48, 49, 80)},
])  # fmt: skip
def test_answers_follow_their_grammar(params: dict[str, Any]) -> None:
    """From a model whose logits are noise: without the mask not one of them would."""
    run = engine(num_blocks=256)
    for request_id in range(24):
        grammar = schema(OBJECT) if request_id % 2 else lark(r"start: /[A-Z]{2,5}-[0-9]+(no|yes)/")
        run.add(request_id, [request_id, 5], grammar=grammar, seed=request_id, stop_ids=(SHADOW, EOS), max_tokens=90, **params)
    ended = 0
    for request_id, answer in run.drain().items():
        if reason(answer) != "stop":
            continue
        ended += 1
        if request_id % 2:
            value = json.loads(text(answer))
            assert list(value) == ["a", "b"] and value["a"] in ("X", "YES") and all(type(item) is bool for item in value["b"])
        else:
            assert re.fullmatch(r"[A-Z]{2,5}-[0-9]+(no|yes)", text(answer))
    assert ended >= 16


def test_a_row_without_a_token_and_what_is_no_text_are_never_chosen() -> None:
    grammar = lark(r"start: /(.|\n)*/")
    run = engine(num_blocks=256)
    for request_id in range(8):
        run.add(request_id, [request_id], grammar=grammar, temperature=9.0, top_k=0, seed=request_id, max_tokens=60)
    chosen = {id for answer in run.drain().values() for id in answer.tokens}
    assert not chosen & {VOCAB - 1, CONTROL} and len(chosen) > 60


def test_an_end_token_spelled_like_text_does_not_end_an_unfinished_answer() -> None:
    """SHADOW's bytes are "a": as text it would be allowed here at every place."""
    for seed in range(20):
        answer = one([seed], lark(r"start: /[ab]{20}/"), temperature=3.0, top_k=0, seed=seed)
        assert reason(answer) == "stop" and re.fullmatch("[ab]{20}", text(answer))


def test_how_it_ends() -> None:
    exact = one([1, 2], lark('start: "yes" "no"'))
    assert (text(exact), reason(exact)) == ("yesno", "stop")
    assert exact.finish is not None and exact.finish.completion_tokens == len(exact.tokens)  # no token is spent on the end
    cut = one([1, 2], lark('start: "yes" "no"'), max_tokens=1)
    assert reason(cut) == "length" and len(cut.tokens) == 1
    last = one([1, 2], lark('start: "y"'), max_tokens=1)
    assert (text(last), reason(last)) == ("y", "stop")
    open_ended = one([1, 2], lark("start: /x*/"), temperature=5.0, top_k=0, seed=3)
    assert reason(open_ended) == "stop" and re.fullmatch("x*", text(open_ended))
    assert open_ended.finish is not None and open_ended.finish.completion_tokens == len(open_ended.tokens) + 1


def test_mates_are_not_affected() -> None:
    """Bit for bit, log-probabilities included, beside constrained rows; and those beside free ones."""
    run = engine(num_blocks=256)
    free: dict[str, Any] = {"temperature": 0.9, "max_tokens": 30, "logprobs": 3, "top_k": 20}
    held: dict[str, Any] = {"temperature": 0.9, "grammar": schema(PAIRS), "max_tokens": 40, "logprobs": 3}
    for i in range(10):
        run.add(i, [i, 7, 9], seed=i, **(held if i % 2 else free))
    for i, answer in run.drain().items():
        expected = one([i, 7, 9], seed=i, **held) if i % 2 else alone([i, 7, 9], seed=i, **free)
        # a constrained request begins when its grammar is compiled: later, but with the same tokens
        assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)


def test_logprobs_are_the_model_s_own() -> None:
    held = one([3, 4], lark('start: "no" "yes"'), logprobs=3)
    free = alone([3, 4], logprobs=3, max_tokens=1)
    assert held.logprobs[0].top == free.logprobs[0].top and held.logprobs[0].logprob <= free.logprobs[0].logprob


def test_preemption_and_recomputation() -> None:
    run = engine(num_blocks=14, block_size=4, context_length=48, max_num_seqs=4, prefix_cache=False)
    grammar = lark(r"start: /([a-f]{6} ){5}x/")
    for i in range(6):
        run.add(i, [i, 1, 2], grammar=grammar, temperature=1.0, seed=i, stop_ids=(SHADOW, EOS))
    answers = run.drain()
    assert run.engine.stats().num_preemptions > 0
    for i, answer in answers.items():
        assert reason(answer) == "stop" and re.fullmatch("([a-f]{6} ){5}x", text(answer))
        assert answer.tokens == one([i, 1, 2], grammar, {"context_length": 48}, temperature=1.0, seed=i).tokens


def test_context_shifts() -> None:
    answer = one([1, 2, 3], lark(r"start: /([a-f]{6} ){9}x/"), {"context_length": 24}, temperature=1.0, seed=5)
    assert answer.finish is not None and answer.finish.num_shifts > 1
    assert reason(answer) == "stop" and re.fullmatch("([a-f]{6} ){9}x", text(answer))


@pytest.mark.parametrize(("grammar", "problem"), [
    (lark("start: /(/"), "the grammar does not compile"),
    ("{}", "the grammar does not compile"),
    (schema({"$ref": "#"}), "the grammar cannot go on"),
    (lark("start: /(.{1,500}){1,500}=/"), "the grammar cannot go on"),
])  # fmt: skip
def test_a_grammar_that_fails_ends_its_request_alone(grammar: str, problem: str) -> None:
    run = engine()
    run.add(0, [1, 2], max_tokens=12)
    run.add(1, [1, 3], grammar=grammar, max_tokens=30_000, stop_ids=(SHADOW, EOS), temperature=1.0, seed=1)
    run.add(2, [1, 4], grammar=lark('start: "yes"'))
    answers = run.drain()
    failed = answers[1].finish
    assert failed is not None and failed.reason == "error" and failed.error.startswith(problem)
    assert failed.bad_request
    assert answers[0].tokens == alone([1, 2], max_tokens=12).tokens and text(answers[2]) == "yes"


def test_compiling_holds_nothing_up() -> None:
    """While a vocabulary is read, others get their tokens, an abort ends the wait, and an idle engine does not spin."""
    run = Run()

    def slow() -> Vocabulary:
        time.sleep(0.5)
        return vocabulary()

    run.engine.arrivals.grammars = Grammars(slow)
    run.add(0, [1, 2], grammar=lark('start: "yes"'))
    run.add(1, [1, 2], grammar=lark('start: "no"'))
    run.add(2, [1, 2], max_tokens=5)
    with pytest.raises(EngineError, match="in use"):
        run.add(0, [1, 2])
    run.answers[0] = Answer()
    while run.answers[2].finish is None:
        run.step()
    assert run.answers[2].finish.reason == "length" and run.engine.stats().num_waiting == 2
    run.engine.abort(1)
    steps = 0
    while run.engine.has_work:
        run.step()
        steps += 1
    assert run.answers[1].finish is not None and run.answers[1].finish.reason == "abort"
    assert text(run.answers[0]) == "yes" and steps < 60


def test_what_nobody_waits_for_is_not_compiled() -> None:
    """A client that asks for heavy grammars and leaves, again and again, holds others up by one of them."""
    run = engine()
    grammars = run.engine.arrivals.grammars
    compiled: list[str] = []
    may_go_on, begun = threading.Event(), threading.Event()

    def compile(text: str) -> Any:
        begun.set()
        assert may_go_on.wait(60)
        compiled.append(text)
        return Grammars._compile(grammars, text)

    grammars._compile = compile  # type: ignore[method-assign]
    texts = [lark(f'start: "no" "{n}"') for n in range(20)]
    for request_id, own in enumerate(texts):
        run.add(request_id, [1, 2], grammar=own)
    assert begun.wait(60)
    for request_id in range(20):
        run.engine.abort(request_id)
    run.add(20, [1, 2], grammar=lark('start: "yes"'))
    may_go_on.set()
    assert text(run.drain()[20]) == "yes" and compiled == [texts[0], lark('start: "yes"')]


def test_without_a_vocabulary() -> None:
    answer = Run().one([1, 2], grammar=lark('start: "yes"'))
    assert answer.finish is not None and answer.finish.error == "this engine has no vocabulary for grammars"
    run = Run()
    run.engine.arrivals.grammars = Grammars(lambda: Vocabulary(TOKENS, [CONTROL], []))
    answer = run.one([1, 2], grammar=lark('start: "yes"'))
    assert answer.finish is not None and "no end-of-generation token" in answer.finish.error


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_mask_is_the_grammar_s(rows: int) -> None:
    """Each bit against a look at the token's bytes, for rows in different grammars and a free one between them."""
    grammars = Grammars(vocabulary)
    letters: list[bytes | None] = [b"ab", None, b"0123456789", b" ", "é".encode()]
    made: list[Grammar | None] = [
        None if each is None else grammars.start(lark(f"start: /[{each.decode()}]{{9}}/")).result() for each in letters[:rows]
    ]
    logits = torch.randn(rows, VOCAB)
    before = logits.clone()
    constrain(logits, made)
    for row, each in enumerate(letters[:rows]):
        if each is None:
            assert torch.equal(logits[row], before[row])
            continue
        fits = [
            bool(token) and id < CONTROL and re.fullmatch(b"[" + each + b"]+", token) is not None
            for id, token in enumerate(TOKENS)
        ]
        if each == "é".encode():
            fits = [token in ("é".encode(), "é".encode()[:1]) and id < CONTROL for id, token in enumerate(TOKENS)]
        allowed = np.isfinite(logits[row].numpy())
        assert allowed.tolist() == [*fits, False]
        assert torch.equal(logits[row][allowed], before[row][allowed])
