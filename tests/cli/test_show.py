"""The blocks of `show`, and the PROCESSOR column of `ps`."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ollamapy.api.types import Details, RunningModel, RunningResponse, ShowResponse, TensorEntry
from ollamapy.cli.listing import processor, running
from ollamapy.cli.show import human_number, summary

DETAILS = Details(
    parent_model="", format="gguf", family="llama", families=["llama"], parameter_size="3.2B", quantization_level="Q4_K_M"
)


def response(**fields: Any) -> ShowResponse:
    return ShowResponse(**{"details": DETAILS, "model_info": {}, "modified_at": "", **fields})


def test_blocks() -> None:
    info = response(
        model_info={"general.architecture": "llama", "llama.context_length": 131072, "llama.embedding_length": 3072},
        capabilities=["completion", "tools"],
        parameters='stop                           "<|start header|>"\ntemperature                    0.5',
        system="One.\n\n Two.\nThree.\n",
        license="MIT\n",
        requires="0.14.0",
    )
    assert summary(info) == (
        "  Model\n"
        "    architecture        llama\n"
        "    parameters          3.2B\n"
        "    context length      131072\n"
        "    embedding length    3072\n"
        "    quantization        Q4_K_M\n"
        "    requires            0.14.0\n"
        "\n"
        "  Capabilities\n"
        "    completion\n"
        "    tools\n"
        "\n"
        "  Parameters\n"
        '    stop           "<|start header|>"\n'
        "    temperature    0.5\n"
        "\n"
        "  System\n"
        "    One.\n"
        "    Two.\n"
        "    ...\n"
        "\n"
        "  License\n"
        "    MIT\n"
        "\n"
    )


def test_verbose_adds_metadata_and_tensors() -> None:
    info = response(
        model_info={
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
            "general.architecture": "llama",
            "llama.rope.freq_base": 500000.0,
            "llama.eps": 1e-5,
            "ok": True,
            "empty": [],
        },
        tensors=[TensorEntry("token_embd.weight", "Q6_K", [49152, 576])],
    )
    text = summary(info, verbose=True)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("    "))
    assert rows["tokenizer.ggml.tokens"] == "[<unk> ...+3 more]"
    assert (rows["llama.rope.freq_base"], rows["llama.eps"], rows["ok"], rows["empty"]) == ("500000", "1e-05", "true", "[]")
    assert rows["token_embd.weight"].split(maxsplit=1) == ["Q6_K", "[49152 576]"]
    assert "Metadata" not in summary(info)


def test_projector_and_remote() -> None:
    projector = {"general.architecture": "clip", "general.parameter_count": 428_000_000, "clip.vision.projection_dim": 2560}
    text = summary(response(projector_info=projector, remote_model="big", remote_host="https://ollama.com"))
    assert "    Remote URL      https://ollama.com\n" in text
    assert "  Projector\n    architecture    clip\n    parameters      428.00M\n    dimensions      2560\n" in text


@pytest.mark.parametrize(
    ("count", "shown"), [(512, "512"), (15_300, "15K"), (134_515_008, "134.52M"), (7 * 10**9, "7B"), (3_212_749_888, "3.2B")]
)
def test_human_number(count: int, shown: str) -> None:
    assert human_number(count) == shown


@pytest.mark.parametrize(
    ("size", "vram", "shown"),
    [
        (100, 0, "100% CPU"),
        (100, 100, "100% GPU"),
        (100, 120, "Unknown"),
        (0, 5, "Unknown"),
        (1000, 745, "26%/74% CPU/GPU"),
        (3, 2, "33%/67% CPU/GPU"),
    ],
)
def test_processor(size: int, vram: int, shown: str) -> None:
    assert processor(size, vram) == shown


def test_ps_rows() -> None:
    model = RunningModel(
        name="m:latest",
        model="m:latest",
        size=1_300_000_000,
        digest="ab" * 32,
        details=DETAILS,
        expires_at="2020-01-01T00:00:00Z",
        size_vram=0,
        context_length=4096,
        notes=["spilled"],
        engine={"resident_bytes": 5_000_000, "kernels": {"linear": "csrc"}, "load_ns": 1_500_000_000},
    )
    found = RunningResponse([model])
    rows = running(found).splitlines()
    assert rows[0].split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert re.split(r"\s{4,}", rows[1]) == ["m:latest", "abababababab", "1.3 GB", "100% CPU", "4096", "Stopping..."]
    assert len(rows) == 2 and len(running(found, "x").splitlines()) == 1
    details = running(found, verbose=True)
    for fact in ("note              spilled", "resident          5 MB", "kernels linear    csrc", "load              1.5s"):
        assert f"    {fact}" in details
