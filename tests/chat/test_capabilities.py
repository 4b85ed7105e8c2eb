"""What models are said to be able to do."""

from __future__ import annotations

from typing import Any

import pytest

from ollamapy.chat.capabilities import capabilities

LLAMA = {"general.architecture": "llama"}
TOOLS = "{% if tools %}{{ tools }}{% endif %}"
THINK = "<think>{{ x }}</think>"
GO = "{{ range .Messages }}{{ .Content }}{{ end }}"


@pytest.mark.parametrize(
    ("metadata", "template", "projector", "extra", "expected"),
    [
        (LLAMA, None, False, [], ["completion"]),
        ({**LLAMA, "llama.pooling_type": 1}, None, False, [], ["embedding"]),
        ({**LLAMA, "llama.vision.block_count": 2}, None, False, [], ["completion", "vision"]),
        (LLAMA, None, True, [], ["completion", "vision"]),
        (LLAMA, GO + "{{ .Tools }}", False, [], ["completion", "tools"]),
        (LLAMA, "{{ .Prompt }}{{ .Suffix }}", False, [], ["completion", "insert"]),
        (LLAMA, "{{ range .Messages }}<think>{{ .Thinking }}</think>{{ end }}", False, [], ["completion", "thinking"]),
        ({**LLAMA, "tokenizer.chat_template": TOOLS}, None, False, [], ["completion", "tools"]),
        ({**LLAMA, "tokenizer.chat_template": TOOLS}, GO, False, [], ["completion", "tools"]),
        ({**LLAMA, "tokenizer.chat_template": "x"}, GO + "{{ .Tools }}", False, [], ["completion", "tools"]),
        ({**LLAMA, "tokenizer.chat_template": THINK}, None, False, [], ["completion", "thinking"]),
        ({**LLAMA, "tokenizer.chat_template": "{{ content.split('</think>') }}"}, None, False, [], ["completion", "thinking"]),
        ({"general.architecture": "gptoss"}, None, False, [], ["completion", "thinking"]),
        (LLAMA, "{{ broken", False, [], ["completion"]),
        (LLAMA, None, False, ["tools", "completion", "image"], ["completion", "tools", "image"]),
    ],
)
def test_capabilities(
    metadata: dict[str, Any], template: str | None, projector: bool, extra: list[str], expected: list[str]
) -> None:
    assert capabilities(metadata, template, projector, extra) == expected


def test_the_environment_decides_which_template_counts() -> None:
    metadata = {**LLAMA, "tokenizer.chat_template": TOOLS}
    assert capabilities(metadata, GO, False, go_template=True) == ["completion"]
    assert capabilities(metadata, GO, False, go_template=False) == ["completion", "tools"]
