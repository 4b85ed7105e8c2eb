"""Which format is chosen, the stops found in Jinja templates, and continued answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ollamapy.api.messages import Message
from ollamapy.chat.format import BUILTIN, SpecialTokens, choose
from ollamapy.chat.goformat import GoFormat
from ollamapy.chat.jinjaformat import JinjaFormat
from ollamapy.errors import TemplateError
from tests.conftest import DATA

SPECIAL = SpecialTokens("<s>", "</s>")
JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
JINJA_TOOLS = (
    JINJA + "{{ tools }}{% for c in messages[0].tool_calls %}{% if m.role == 'tool' %}tool_response{% endif %}{% endfor %}"
)
PLAIN_TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A {% else %}{{ m.content }}#END# {% endif %}{% endfor %}"
)
GO = "{{ range .Messages }}{{ .Content }}{{ end }}"
GO_TOOLS = GO + '{{ .Tools }}{{ range .Messages }}{{ .ToolCalls }}{{ if eq .Role "tool" }}{{ end }}{{ end }}'


def _chosen(template: str | None, jinja: str = "", go_template: bool | None = None, **more: Any) -> str:
    metadata = {"tokenizer.chat_template": jinja} if jinja else {}
    return choose(template=template, metadata=metadata, go_template=go_template, special=SPECIAL, **more).name


def test_order_of_choice() -> None:
    assert _chosen(None) == "plain"
    assert _chosen(None, JINJA) == "chat_template"
    assert _chosen(GO, JINJA) == "template"
    assert _chosen(GO) == "template"
    assert _chosen(GO, JINJA_TOOLS) == "chat_template"  # it can do more
    assert _chosen(GO_TOOLS, JINJA_TOOLS) == "template"
    assert _chosen("{{ .Tools }}{{ .Messages }}", JINJA_TOOLS) == "chat_template"  # only it has the whole round of tools
    assert _chosen(GO, JINJA_TOOLS, go_template=True) == "template"
    assert _chosen(GO, JINJA, go_template=False) == "chat_template"
    assert _chosen(GO, go_template=False) == "template"  # nothing else is there
    assert _chosen(None, JINJA_TOOLS, go_template=False, request_template=GO) == "template"


def test_builtin_formats_come_before_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, "mine", lambda special: JinjaFormat("{{ eos_token }}", special, name="mine"))
    assert _chosen(GO, JINJA, builtin="mine") == "mine"
    assert _chosen(GO, JINJA, builtin="unknown") == "template"
    assert _chosen(GO, JINJA, builtin="mine", request_template=GO) == "template"


def test_templates_that_do_not_parse_are_errors() -> None:
    for arguments in ({"template": "{{ .x"}, {"template": None, "jinja": "{{ x"}):
        with pytest.raises(TemplateError):
            _chosen(**arguments)


def test_plain_prompts() -> None:
    plain = choose(template=None, metadata={}, go_template=None, special=SPECIAL)
    assert plain.render([Message("system", "s"), Message("user", "hello")]) == "hello"
    assert plain.render_completion("hello", system="s") == "hello"
    assert plain.stops == () and plain.capabilities == frozenset()


def test_completion_of_jinja_formats() -> None:
    chat_format = JinjaFormat(JINJA, SPECIAL)
    assert chat_format.render_completion("p", system="s") == "<system>s<|end|><user>p<|end|><bot>"
    assert chat_format.render_completion("p") == "<user>p<|end|><bot>"
    with pytest.raises(TemplateError, match="insert"):
        chat_format.render_completion("p", suffix="q")


@pytest.mark.parametrize(
    ("source", "stops"),
    [
        (JINJA, ("<|end|>",)),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ("user:",)),
        ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", ("</s>",)),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", ()),
        (PLAIN_TURNS, ("#END# Q",)),
        ("{{ raise_exception('no') }}", ()),
        ("{{ messages[-1].content }}", ()),
        ("{% for m in messages %}{{ m.content }}[/INST] {% endfor %}", ("[/INST]",)),
    ],
)
def test_stops(source: str, stops: tuple[str, ...]) -> None:
    assert JinjaFormat(source, SPECIAL).stops == stops


def test_a_special_token_need_not_look_like_one() -> None:
    source = "{% for m in messages %}{{ m.content }} ~over~ next {% endfor %}"
    assert JinjaFormat(source, SpecialTokens("", "", frozenset({"~over~"}))).stops == ("~over~",)


def test_every_known_template_has_a_stop_that_ends_its_turns() -> None:
    for line in (DATA / "known_jinja.jsonl").read_text().splitlines():
        for source in json.loads(line).values():
            chat_format = JinjaFormat(source, SPECIAL)
            (stop,) = chat_format.stops
            whole = chat_format.render([Message("user", "a"), Message("assistant", "ANSWER"), Message("user", "b")])
            assert stop in whole.partition("ANSWER")[2]


def test_a_final_assistant_message_is_continued() -> None:
    chat_format = JinjaFormat(JINJA, SPECIAL)
    turns = [Message("user", "a"), Message("assistant", "one two ")]
    assert chat_format.render(turns) == "<user>a<|end|><assistant>one two "
    assert chat_format.render([*turns, Message("user", "b")]).endswith("<user>b<|end|><bot>")
    trimming = JinjaFormat(JINJA.replace("m.content", "m.content | trim"), SPECIAL)
    assert trimming.render(turns) == "<user>a<|end|><assistant>one two"
    with pytest.raises(TemplateError, match="cannot continue"):
        JinjaFormat("{{ messages[0].content }}", SPECIAL).render(turns)


def test_images_are_marked() -> None:
    made = JinjaFormat(JINJA, SPECIAL).render(
        [Message("user", "x", images=["AA=="]), Message("user", "[img]", images=["AA=="])]
    )
    assert made == "<user>[img-0]x<|end|><user>[img-1]<|end|><bot>"


def test_go_formats_leave_the_last_turn_to_the_template() -> None:
    source = "{{ .Prompt }}<bot>{{ .Response }}<end>"
    assert GoFormat(source).render([Message("user", "a"), Message("assistant", "pre")]) == "a<bot>pre"
