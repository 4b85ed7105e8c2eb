"""Modelfiles: grammar, errors, printing, round trips, and the request made of one."""

from __future__ import annotations

import codecs
import hashlib
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamapy import modelfile
from ollamapy.api.messages import Message
from ollamapy.errors import BadRequest, ModelfileError, NotFound, OllamapyError, OptionError
from ollamapy.modelfile import Command, Modelfile
from ollamapy.names import ModelName
from ollamapy.store.local import LocalModel
from ollamapy.store.manifests import ConfigBlob, Layer, Manifest


def commands(text: str | bytes) -> list[tuple[str, ...]]:
    return [tuple(part for part in command if part != "") for command in modelfile.parse(text).commands]


def test_every_instruction() -> None:
    text = """
# a comment
  # another
FROM llama3.2
FROM ./projector.gguf
adapter ./lora.gguf
Draft ./draft.gguf
PARAMETER temperature 0.5
PARAMETER\tstop  <|a b|>
TEMPLATE {{ .Prompt }} # not a comment
SYSTEM You are "quoted" here
LICENSE one
LICENSE \"\"\"
two
\"\"\"
MESSAGE user hello: there
MESSAGE assistant "hi
you"
RENDERER qwen3
PARSER qwen3
REQUIRES v0.14.0
QUANTIZE q4_K_M
"""
    assert commands(text) == [
        ("from", "llama3.2"),
        ("from", "./projector.gguf"),
        ("adapter", "./lora.gguf"),
        ("draft", "./draft.gguf"),
        ("parameter", "0.5", "temperature"),
        ("parameter", "<|a b|>", "stop"),
        ("template", "{{ .Prompt }} # not a comment"),
        ("system", 'You are "quoted" here'),
        ("license", "one"),
        ("license", "\ntwo\n"),
        ("message", "hello: there", "user"),
        ("message", "hi\nyou", "assistant"),
        ("renderer", "qwen3"),
        ("parser", "qwen3"),
        ("requires", "v0.14.0"),
        ("quantize", "q4_K_M"),
    ]


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("a", "a"),
        ("  a  b  ", "a  b"),
        ("\ta\t", "a"),
        ('"a"', "a"),
        ('" a "', " a "),
        ('"a" and "b"', 'a" and "b'),
        ('a "b"', 'a "b"'),
        ('""', ""),
        ('""""""', ""),
        ('"""a"""', "a"),
        ('"""a""b"""', 'a""b'),
        ('"""a""""', 'a"'),
        ('"""\n"""', "\n"),
        ('"""\n\n"""', "\n\n"),
        ('"\n"', "\n"),
        ('"""a\n"b"\nc"""', 'a\n"b"\nc'),
        ('"a\r\nb"', "a\r\nb"),
        ("'a'", "'a'"),
        ("a\\nb", "a\\nb"),
        ("a\x07b\u200bc\ufeffd", "abcd"),
        ("smörgås 🦙", "smörgås 🦙"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nPARSER x\n"])
def test_values(value: str, parsed: str, end: str) -> None:
    assert modelfile.parse(f"FROM x\nSYSTEM {value}{end}").commands[1] == Command("system", parsed)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
def test_encodings(encoding: str) -> None:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    assert commands(marks.get(encoding, b"") + "FROM smörgås\n".encode(encoding)) == [("from", "smörgås")]


def test_bytes_that_are_no_text() -> None:
    assert commands(b"FROM x\nSYSTEM \xff\xfe") == [("from", "x"), ("system", "\ufffd\ufffd")]


COMMANDS = (
    'command must be one of "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", '
    '"message", or "requires"'
)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("FROM foo\nBADCOMMAND param1 value1\n", 2, COMMANDS),
        ("\n\r\n# c\n\n1FROM x\n", 5, COMMANDS),
        ("FROM\n", 1, COMMANDS),
        ("FROM: x\n", 1, COMMANDS),
        ('FROM x\nSYSTEM """a\nb\n"""\nNOPE x', 5, COMMANDS),
        ("FROM x\nMESSAGE badguy hello", 2, 'message role must be one of "system", "user", or "assistant"'),
        ("FROM x\nMESSAGE User hello", 2, 'message role must be one of "system", "user", or "assistant"'),
        ("FROM x\nMESSAGE tool hello", 2, 'message role must be one of "system", "user", or "assistant"'),
    ],
)
def test_errors_with_a_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        modelfile.parse(text)
    assert str(caught.value) == f"(line {line}): {problem}" and caught.value.line == line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no FROM line"),
        ("# FROM x", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("FROM x\nSYSTEM", "unexpected EOF: system"),
        ('FROM x\nSYSTEM "a', "unexpected EOF"),
        ('FROM x\nSYSTEM """a""', "unexpected EOF"),
        ('FROM x\nSYSTEM """""', "unexpected EOF"),
        ('FROM x\nSYSTEM """a""" b', "unexpected EOF"),
        ("FROM x\nPARAMETER", "unexpected EOF: parameter"),
        ("FROM x\nPARAMETER top-k 1", "unexpected EOF: top"),
        ("FROM x\nPARAMETER top_k\n1", "unexpected EOF: top_k"),
        ("FROM x\nMESSAGE user", "unexpected EOF: user"),
    ],
)
def test_errors_without_a_line(text: str, problem: str) -> None:
    with pytest.raises(ModelfileError) as caught:
        modelfile.parse(text)
    assert str(caught.value) == problem and caught.value.line is None


def test_parsing_is_linear() -> None:
    text = 'FROM x\nLICENSE """' + "line\n" * 200_000 + '"""\n' + "# c\n" * 200_000
    start = time.perf_counter()
    assert len(modelfile.parse(text).commands[1].args) == 1_000_000
    assert time.perf_counter() - start < 3


@given(st.text(st.sampled_from('FROMfromSYSTEM x"#\n\r\t\\é\0'), max_size=60) | st.text(max_size=40) | st.binary(max_size=40))
def test_any_text_parses_or_is_refused(text: str | bytes) -> None:
    try:
        parsed = modelfile.parse(text)
    except ModelfileError:
        return
    assert parsed.values("from")


def _writable(value: str) -> bool:
    """Whether the language can express the value: no line inside it may end with its closing quotes."""
    lines = [line.rstrip(" \t") for line in value.replace("\r", "\n").split("\n")[:-1]]
    mark = '"""' if '"' in value else '"'
    return not any((f"{mark}{line}" if index == 0 else line).endswith(mark) and (index or len(line) >= len(mark))
                   for index, line in enumerate(lines))  # fmt: skip


values = st.text(st.sampled_from("ab \t\n\"'#é🦙{}:"), max_size=20) | st.text(max_size=10).map(
    lambda text: "".join(c for c in text if c.isprintable())
)
command = st.one_of(
    st.builds(
        Command, st.sampled_from(("template", "system", "license", "adapter", "renderer", "quantize")), values, st.just("")
    ),
    st.builds(Command, st.just("parameter"), values, st.sampled_from(("stop", "num_ctx", "x_1"))),
    st.builds(Command, st.just("message"), values, st.sampled_from(("system", "user", "assistant"))),
).filter(lambda command: _writable(command.args))


@given(st.lists(command, max_size=6))
def test_printing_round_trips(rest: list[Command]) -> None:
    original = Modelfile([Command("from", "x"), *rest])
    assert modelfile.parse(str(original)) == original


def _model(tmp_path: Path) -> LocalModel:
    layer = Layer("m", "sha256:" + "0" * 64, 1)
    return LocalModel(
        name=ModelName.parse("me/Mine"),
        digest="0" * 64,
        manifest=Manifest(layer, [layer]),
        config=ConfigBlob(renderer="r", parser="p"),
        size=1,
        modified_at=datetime.now(UTC),
        model_path=tmp_path / "blobs" / "sha256-1",
        adapter_paths=[tmp_path / "blobs" / "sha256-2"],
        projector_paths=[tmp_path / "blobs" / "sha256-3"],
        draft_path=tmp_path / "blobs" / "sha256-4",
        template='{{ if .System }}"{{ .System }}"{{ end }}\n{{ .Prompt }}',
        system="You are\nhelpful.",
        params={"num_ctx": 4096.0, "stop": ["<|a|>", " b"], "temperature": 0.7, "use_mmap": True, "min_p": None},
        messages=[Message("user", "hi: you"), Message("assistant", "two\nlines")],
        licenses=["MIT", "Other\n"],
    )


def test_show_modelfile(tmp_path: Path) -> None:
    text = modelfile.from_model(_model(tmp_path), options={"temperature": 1, "seed": 5})
    assert (
        text
        == f'''# Modelfile generated by "ollama show"
# To build a new Modelfile based on this, replace FROM with:
# FROM me/Mine:latest

FROM {tmp_path}/blobs/sha256-1
ADAPTER {tmp_path}/blobs/sha256-2
DRAFT {tmp_path}/blobs/sha256-4
FROM {tmp_path}/blobs/sha256-3
TEMPLATE """{{{{ if .System }}}}"{{{{ .System }}}}"{{{{ end }}}}
{{{{ .Prompt }}}}"""
SYSTEM "You are
helpful."
RENDERER r
PARSER p
PARAMETER num_ctx 4096
PARAMETER stop <|a|>
PARAMETER stop " b"
PARAMETER temperature 1
PARAMETER use_mmap true
PARAMETER seed 5
LICENSE MIT
LICENSE "Other
"
MESSAGE user hi: you
MESSAGE assistant "two
lines"
'''
    )
    parsed = modelfile.parse(text)
    assert parsed.values("license") == ["MIT", "Other\n"] and parsed.values("system") == ["You are\nhelpful."]


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_request(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\0weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.gguf").write_bytes(b"GGUF\0projector")
    (tmp_path / "sub" / "config.json").write_text("{}")
    (tmp_path / "lora1.gguf").write_bytes(b"1")
    (tmp_path / "lora2.gguf").write_bytes(b"2")
    text = (
        "FROM ./a.gguf\nFROM sub\nADAPTER lora1.gguf\nADAPTER lora2.gguf\nPARAMETER stop a\nPARAMETER stop b\n"
        "PARAMETER top_k 3\nPARAMETER top_k 5\nPARAMETER penalize_newline 1\nSYSTEM one\nSYSTEM two\nLICENSE x\nLICENSE y\n"
        "MESSAGE user hi\nREQUIRES v0.14\nQUANTIZE q4_K_M\n"
    )
    steps: list[tuple[str, int, int]] = []
    request = modelfile.to_request(
        modelfile.parse(text), tmp_path, lambda path: lambda done, total: steps.append((path.name, done, total))
    )
    assert request.body == {
        "files": {"a.gguf": digest(b"GGUF\0weights"), "p.gguf": digest(b"GGUF\0projector"), "config.json": digest(b"{}")},
        "adapters": {"lora2.gguf": digest(b"2")},
        "parameters": {"stop": ["a", "b"], "top_k": 5},
        "system": "two",
        "license": ["x", "y"],
        "messages": [{"role": "user", "content": "hi"}],
        "requires": "0.14",
        "quantize": "q4_K_M",
    }
    assert request.uploads[digest(b"2")] == tmp_path / "lora2.gguf" and len(request.uploads) == 4
    assert request.warnings == ["parameter penalize_newline is deprecated"]
    assert ("a.gguf", 12, 12) in steps


def test_from_a_name(tmp_path: Path) -> None:
    assert modelfile.to_request(modelfile.parse("FROM llama3.2:1b"), tmp_path).body == {"from": "llama3.2:1b"}


def test_home_and_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/m.gguf", str(tmp_path / "m.gguf")):
        assert modelfile.to_request(modelfile.parse(f"FROM {source}"), Path("/nowhere")).body["files"] == {
            "m.gguf": digest(b"x")
        }


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("FROM ./missing.gguf", NotFound, "no such file"),
        ("FROM x\nADAPTER missing", NotFound, "ADAPTER missing: no such file"),
        ("FROM x\nPARAMETER top_k many", OptionError, r"invalid int value \[many\]"),
        ("FROM x\nPARAMETER nope 1", OptionError, "unknown parameter 'nope'"),
        ("FROM x\nREQUIRES soon", ModelfileError, r"requires must be a valid semver \(e.g. 0.14.0\)"),
        ("FROM fifo", BadRequest, "fifo is not a regular file"),
        ("FROM /dev/zero", BadRequest, "zero is not a regular file"),
        ("FROM empty", NotFound, "no Modelfile or safetensors files found"),
        ("FROM a.gguf\nDRAFT ./empty/../a.gguf", ModelfileError, "DRAFT must not reference the same local path as FROM"),
        ("FROM out", BadRequest, "insecure path: model.safetensors"),
        ("FROM lfs", BadRequest, "invalid content type: expected application/octet-stream for w.gguf"),
        ("FROM a.gguf\nFROM other/a.gguf", BadRequest, "two different files are named a.gguf"),
    ],
)
def test_request_errors(tmp_path: Path, text: str, error: type[OllamapyError], match: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    for folder in ("empty", "out", "lfs", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.gguf").write_bytes(b"x")
    (tmp_path / "other" / "a.gguf").write_bytes(b"y")
    (tmp_path / "out" / "model.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "lfs" / "w.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(error, match=match):
        modelfile.to_request(modelfile.parse(text), tmp_path)


FOLDER = [
    "model-1.safetensors",
    "sub/model.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "consolidated.00.pth",
]
FOLDER += ["w.gguf", "other.bin", "config.json", "sub/config.json", "tokenizer.model", "chat_template.jinja", "notes.txt"]
EXPECTED = [FOLDER[:2], FOLDER[2:3], FOLDER[3:4], FOLDER[4:5], FOLDER[5:6], FOLDER[6:7]]


@pytest.mark.parametrize("removed", range(6))
def test_folder_search_order(tmp_path: Path, removed: int) -> None:
    (tmp_path / "sub").mkdir()
    gone = {name for group in EXPECTED[:removed] for name in group}
    for name in set(FOLDER) - gone:
        text = name.endswith((".json", ".jinja", ".txt"))
        content = b"{}" if text else b"PK\x03\x04\0\1" if name.startswith(("pytorch", "consol")) else b"GGUF\0\1"
        (tmp_path / name).write_bytes(content)
    body = modelfile.to_request(modelfile.parse("FROM ."), tmp_path).body
    beside = {"config.json", "sub/config.json", "tokenizer.model", "chat_template.jinja"}
    assert set(body["files"]) == set(EXPECTED[removed]) | beside
