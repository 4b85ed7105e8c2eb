"""Messages to token ids: what is put before, what is left out, what is cut and how it is counted."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ollamapy.api.messages import Message
from ollamapy.chat.goformat import GoFormat
from ollamapy.errors import ContextOverflow
from ollamapy.gguf.reader import GGUFFile
from ollamapy.names import ModelName
from ollamapy.server.prompt import Room, chat_prompt, conversation, text_prompt
from ollamapy.store.library import LocalModel
from ollamapy.store.manifests import ConfigBlob, Layer, Manifest
from ollamapy.tokenizer import Tokenizer

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    with GGUFFile.open(smollm2_path) as file:
        return Tokenizer.from_gguf(file.metadata)


def model(name: str = "m", *, family: str = "", system: str = "", messages: list[Message] | None = None) -> LocalModel:
    return LocalModel(
        name=ModelName.parse(name),
        digest="",
        manifest=Manifest(Layer("", "sha256:" + "0" * 64, 0), []),
        config=ConfigBlob(model_family=family),
        size=0,
        modified_at=datetime.now(UTC),
        system=system,
        messages=messages or [],
    )


def turns(*given: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in given]


def shown(messages: list[Message]) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in messages]


def test_the_models_own_messages_and_system_come_first() -> None:
    made = model(system="S", messages=turns(("user", "a"), ("assistant", "b")))
    assert shown(conversation(made, turns(("user", "c")))) == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    own = conversation(made, turns(("system", "T"), ("user", "c")))
    assert shown(own) == [("user", "a"), ("assistant", "b"), ("system", "T"), ("user", "c")]
    assert shown(conversation(model(), turns(("user", "c")))) == [("user", "c")]


@pytest.mark.parametrize(("made", "strips"), [
    (model(family="qwen3"), True), (model("someone/DeepSeek-R1:1.5b"), True), (model(family="llama"), False)
])  # fmt: skip
def test_old_thoughts_are_left_out(made: LocalModel, strips: bool) -> None:
    thought = "<think>\nhm\n</think>\n\nYes"
    given = turns(("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought))
    contents = [message.content for message in conversation(made, given)]
    assert contents == ["a", "Yes" if strips else thought, "b", thought]


def test_the_oldest_messages_go_first(tokenizer: Tokenizer) -> None:
    form = GoFormat(CHATML)
    given = turns(("system", "S"), *((("user", "assistant")[n % 2], f"turn{n} " + "word " * 10) for n in range(9)))
    whole = chat_prompt(given, form, None, tokenizer, Room(4096, 4, True, True))
    assert whole.num_cut == 0 and whole.total == len(whole.ids) == len(tokenizer.encode(form.render(given), add_special=True))
    cut = chat_prompt(given, form, None, tokenizer, Room(80, 4, True, True))
    assert cut.total == whole.total and len(cut.ids) < 80 and cut.num_cut == whole.total - len(cut.ids)
    assert "<|im_start|>system\nS" in cut.text and "turn8" in cut.text and "turn0" not in cut.text
    with pytest.raises(ContextOverflow) as error:
        chat_prompt(given, form, None, tokenizer, Room(80, 4, False, True))
    assert (error.value.num_tokens, error.value.context_length) == (whole.total, 80)


@pytest.mark.parametrize("num_ctx", [16, 17, 64])
def test_a_text_is_cut_in_its_middle(tokenizer: Tokenizer, num_ctx: int) -> None:
    text = " ".join(f"w{n}" for n in range(200))
    ids = tokenizer.encode(text, add_special=True)
    made = text_prompt(text, tokenizer, Room(num_ctx, 4, True, True))
    assert len(made.ids) < num_ctx and made.total == len(ids)
    assert made.ids[:2] == ids[:2] and made.ids[-1] == ids[-1]
    for room in (Room(num_ctx, 4, True, False), Room(num_ctx, 4, False, True)):
        with pytest.raises(ContextOverflow):
            text_prompt(text, tokenizer, room)


def test_the_edges_of_the_context(tokenizer: Tokenizer) -> None:
    """One token must be left to generate."""
    ids = tokenizer.encode("one two three four", add_special=True)
    assert text_prompt("one two three four", tokenizer, Room(len(ids) + 1, 0, False, False)).ids == ids
    with pytest.raises(ContextOverflow):
        text_prompt("one two three four", tokenizer, Room(len(ids), 0, False, False))
