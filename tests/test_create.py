"""Creating models: every source, what is inherited and replaced, status lines, errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ollamapy import modelfile
from ollamapy.api.types import CreateRequest
from ollamapy.create import create_model, human_number
from ollamapy.errors import BadRequest, GGUFError, NotFound, OllamapyError, TemplateError
from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf, write_split
from ollamapy.names import ModelName
from ollamapy.store.digest import Digest
from ollamapy.store.library import Library, LocalModel
from ollamapy.store.manifests import ADAPTER, DRAFT, LICENSE, MESSAGES, MODEL, PARAMS, PROJECTOR, SYSTEM, TEMPLATE

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "tokenizer.ggml.tokens": ["a", "b"],
}


def tensors(count: int = 2, size: int = 64) -> list[tuple[str, GGMLType, tuple[int, ...], bytes]]:
    return [(f"t{index}", GGMLType.F32, (3, size), bytes([index]) * (12 * size)) for index in range(count)]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


def upload(library: Library, path: Path) -> str:
    data = path.read_bytes()
    digest = Digest.of(data)
    with library.blobs.ingest(digest, size=len(data)) as writer:
        writer.write(data)
    return digest.text


def gguf(library: Library, tmp_path: Path, name: str = "w.gguf", **changes: Any) -> str:
    metadata = {**METADATA, **{key.replace("__", "."): value for key, value in changes.items()}}
    write_gguf(tmp_path / name, {key: value for key, value in metadata.items() if value is not None}, tensors())
    return upload(library, tmp_path / name)


def create(library: Library, **fields: Any) -> list[str]:
    """Status lines of a request that comes as JSON."""
    request = msgspec.json.decode(json.dumps(fields), type=CreateRequest)
    lines: list[str] = []
    create_model(request, library, lambda progress: lines.append(progress.status))
    return lines


def opened(library: Library, name: str) -> LocalModel:
    return library.open(ModelName.parse(name))


def kinds(model: LocalModel) -> list[str]:
    return [layer.media_type for layer in model.manifest.layers]


def test_from_gguf_with_everything(library: Library, tmp_path: Path) -> None:
    digest = gguf(library, tmp_path)
    lines = create(
        library,
        model="Mine",
        files={"w.gguf": digest},
        template="{{ .Prompt }}",
        system="Be brief.",
        license=["MIT", "Apache"],
        parameters={"temperature": 0.5, "stop": ["a"]},
        messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "thinking": "left out"}],
        renderer="r",
        parser="p",
        requires="v0.14.0",
    )
    model = opened(library, "mine")
    assert kinds(model) == [MODEL, TEMPLATE, SYSTEM, LICENSE, LICENSE, PARAMS, MESSAGES]
    assert model.model_path is not None and model.model_path.read_bytes() == (tmp_path / "w.gguf").read_bytes()
    assert (model.template, model.system, model.licenses) == ("{{ .Prompt }}", "Be brief.", ["MIT", "Apache"])
    assert model.params == {"temperature": 0.5, "stop": ["a"]}
    assert [(m.role, m.content) for m in model.messages] == [("user", "hi"), ("assistant", "ho")]
    config = model.config
    assert (config.model_format, config.model_family, config.model_families) == ("gguf", "llama", ["llama"])
    assert (config.model_type, config.file_type) == ("384", "Q4_K_M")
    assert (config.context_length, config.embedding_length) == (2048, 64)
    assert (config.renderer, config.parser, config.requires) == ("r", "p", "0.14.0")
    layers = [f"creating new layer {layer.digest}" for layer in model.manifest.layers[1:]]
    assert lines == ["parsing GGUF", f"using existing layer {digest}", *layers, "writing manifest", "success"]
    document = json.loads(library.manifests.path(model.name).read_bytes())
    assert document["schemaVersion"] == 2 and document["config"]["mediaType"].startswith("application/vnd.docker.container")
    config_file = json.loads(library.blobs.path(model.manifest.config.blob).read_bytes())
    assert config_file["rootfs"] == {"type": "layers", "diff_ids": [layer.digest for layer in model.manifest.layers]}
    assert config_file["architecture"] == "amd64" and config_file["os"] == "linux"


def base(library: Library, tmp_path: Path) -> None:
    create(
        library,
        model="base",
        files={"w.gguf": gguf(library, tmp_path)},
        template="old",
        system="old",
        license="MIT",
        parameters={"temperature": 0.5, "top_k": 3},
        messages=[{"role": "user", "content": "old"}],
        renderer="r",
        info={"capabilities": ["tools"]},
    )


def test_from_a_model_inherits(library: Library, tmp_path: Path) -> None:
    base(library, tmp_path)
    lines = create(library, model="child", **{"from": "BASE"})
    parent, child = opened(library, "base"), opened(library, "child")
    assert [(x.media_type, x.digest) for x in child.manifest.layers] == [
        (x.media_type, x.digest) for x in parent.manifest.layers
    ]
    assert {layer.source for layer in child.manifest.layers} == {"base:latest"}
    assert (child.template, child.params, child.config.renderer) == ("old", {"temperature": 0.5, "top_k": 3}, "r")
    assert child.config == parent.config
    assert "parsing GGUF" not in lines and not any("creating" in line for line in lines)


def test_from_a_model_replaces_merges_appends(library: Library, tmp_path: Path) -> None:
    base(library, tmp_path)
    create(
        library,
        model="child",
        template="new",
        system="new",
        license="Apache",
        parameters={"top_k": 9, "stop": ["x"]},
        messages=[{"role": "user", "content": "new"}],
        parser="p",
        info={"model_family": "x", "parameter_size": "1B", "quantization_level": "Q9", "context_length": 7.0, "base_name": "b"},
        **{"from": "base"},
    )
    child = opened(library, "child")
    assert (child.template, child.system, child.licenses) == ("new", "new", ["MIT", "Apache"])
    assert child.params == {"temperature": 0.5, "top_k": 9, "stop": ["x"]}
    assert [m.content for m in child.messages] == ["new"]
    assert len(kinds(child)) == len(set(kinds(child))) + 1  # only the licence twice
    config = child.config
    assert (config.renderer, config.parser, config.capabilities, config.model_family) == ("r", "p", ["tools"], "x")
    assert (config.model_families, config.model_type, config.file_type) == (["x"], "1B", "Q9")
    assert (config.context_length, config.base_name) == (7, "b")


def test_a_model_from_itself(library: Library, tmp_path: Path) -> None:
    base(library, tmp_path)
    create(library, model="Base:latest", system="new", **{"from": "base"})
    assert [model.name.short() for model in library.list()] == ["base:latest"]
    assert opened(library, "base").system == "new"
    assert library.blobs.has(Digest.of(b"old"))  # still its template
    assert library.check(deep=True) == []


def test_replacing_removes_what_nothing_needs(library: Library, tmp_path: Path) -> None:
    create(library, model="m", files={"w.gguf": gguf(library, tmp_path)}, system="one")
    create(library, model="m", files={"w.gguf": gguf(library, tmp_path, llama__context_length=9)}, system="two")
    assert not library.blobs.has(Digest.of(b"one")) and library.blobs.has(Digest.of(b"two"))
    assert set(library.blobs.digests()) == opened(library, "m").manifest.blobs()


def test_projector_adapter_draft(library: Library, tmp_path: Path) -> None:
    projector = gguf(library, tmp_path, "p.gguf", general__architecture="clip", general__type="mmproj")
    adapter = gguf(library, tmp_path, "a.gguf", general__type="adapter")
    draft = gguf(library, tmp_path, "d.gguf", general__architecture="qwen2")
    files = {"w.gguf": gguf(library, tmp_path), "p.gguf": projector}
    create(library, model="m", files=files, adapters={"a.gguf": adapter}, draft_files={"d.gguf": draft})
    model = opened(library, "m")
    assert sorted(kinds(model)) == sorted([MODEL, PROJECTOR, ADAPTER, DRAFT])
    assert model.config.model_families == ["llama", "clip"] or model.config.model_families == ["clip", "llama"]
    assert model.config.model_family == "llama" and model.config.draft["architecture"] == "qwen2"
    assert [len(model.projector_paths), len(model.adapter_paths)] == [1, 1] and model.draft_path is not None
    other = gguf(library, tmp_path, "b.gguf", general__type="adapter", general__name="other")
    create(library, model="child", adapters={"b.gguf": other}, **{"from": "m"})
    assert [path.name for path in opened(library, "child").adapter_paths] == [Digest.parse(other).file_name]
    create(library, model="child2", files={"p.gguf": projector}, **{"from": "m"})
    assert opened(library, "child2").model_path == model.model_path


def test_projector_without_blocks(library: Library, tmp_path: Path) -> None:
    projector = gguf(
        library, tmp_path, "v.gguf", llama__block_count=None, llama__vision__block_count=3, **{"general.name": "v"}
    )
    create(library, model="m", files={"v.gguf": projector, "w.gguf": gguf(library, tmp_path)})
    assert sorted(kinds(opened(library, "m"))) == sorted([MODEL, PROJECTOR])


def test_folder_with_json_beside(library: Library, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = {"w.gguf": gguf(library, tmp_path), "config.json": upload(library, tmp_path / "config.json")}
    create(library, model="m", files=files)
    assert kinds(opened(library, "m")) == [MODEL]


def test_name_without_suffix_is_sniffed(library: Library, tmp_path: Path) -> None:
    create(library, model="m", files={"weights": gguf(library, tmp_path)})
    assert kinds(opened(library, "m")) == [MODEL]


def test_split_files_are_merged(library: Library, tmp_path: Path) -> None:
    parts = tensors(5)
    write_split(tmp_path, "big", METADATA, [parts[:2], parts[2:4], parts[4:]])
    names = [f"big-{number:05}-of-00003.gguf" for number in (3, 1, 2)]
    create(library, model="m", files={name: upload(library, tmp_path / name) for name in names})
    model = opened(library, "m")
    assert kinds(model) == [MODEL] and model.config.model_type == "960" and model.model_path is not None
    with GGUFFile.open(model.model_path) as file:
        assert not any(key.startswith("split.") for key in file.metadata)
        assert {key: file.metadata[key] for key in METADATA} == METADATA
        assert {name: bytes(file.data(name)) for name in file.tensors} == {name: data for name, _, _, data in parts}
    library.blobs.remove_stale(0)
    assert [path for path in library.blobs.folder.iterdir() if not path.name.startswith("sha256-")] == []
    with pytest.raises(GGUFError, match="parts"):
        create(library, model="m2", files={name: upload(library, tmp_path / name) for name in names[:2]})


def test_modelfile_field(library: Library, tmp_path: Path) -> None:
    digest = gguf(library, tmp_path)
    text = f'FROM /somewhere/blobs/{digest.replace(":", "-")}\nPARAMETER top_k 3\nSYSTEM "one"\nTEMPLATE t\nMESSAGE user hi\n'
    create(library, model="m", modelfile=text, system="two")
    model = opened(library, "m")
    assert (model.system, model.template, model.params) == ("two", "t", {"top_k": 3})
    create(library, model="m2", modelfile=f"FROM @{digest}".replace("@", ""))
    create(library, model="m3", modelfile="FROM m\nLICENSE x")
    assert opened(library, "m3").licenses == ["x"]


def test_shown_modelfile_makes_the_same_model(library: Library, tmp_path: Path) -> None:
    base(library, tmp_path)
    model = opened(library, "base")
    create(library, model="again", modelfile=modelfile.from_model(model))
    again = opened(library, "again")
    assert (again.template, again.system, again.params, again.licenses) == (
        model.template,
        model.system,
        model.params,
        model.licenses,
    )
    assert [m.content for m in again.messages] == ["old"] and again.model_path == model.model_path


ZERO = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({}, BadRequest, "invalid model name"),
        ({"model": "a b", "from": "x"}, BadRequest, "invalid model name"),
        ({"model": "m"}, BadRequest, "neither 'from' or 'files' was specified"),
        ({"model": "m", "from": "nope"}, NotFound, "model 'nope' not found"),
        ({"model": "m", "from": "no pe"}, BadRequest, "invalid model name"),
        ({"model": "m", "from": "x:cloud"}, BadRequest, "remote models (:cloud) are not supported yet"),
        ({"model": "m", "from": "x:cloud:local"}, BadRequest, "use either :local or :cloud, not both"),
        ({"model": "m", "files": {"/a.gguf": ZERO}}, BadRequest, "file path must be relative"),
        ({"model": "m", "files": {"a/../../b.gguf": ZERO}}, BadRequest, "file path must be relative"),
        ({"model": "m", "files": {"C:\\a.gguf": ZERO}}, BadRequest, "file path must be relative"),
        ({"model": "m", "files": {"": ZERO}}, BadRequest, "file path must be relative"),
        ({"model": "m", "files": {"a.gguf": "sha256:12"}}, BadRequest, "invalid digest format"),
        ({"model": "m", "files": {"a.gguf": "../../etc/passwd"}}, BadRequest, "invalid digest format"),
        ({"model": "m", "files": {"a.gguf": ZERO}}, BadRequest, f"blob not found for a.gguf (digest {ZERO})"),
        ({"model": "m", "files": {"a.gguf": "TEXT"}}, BadRequest, "supplied file was not in GGUF format"),
        ({"model": "m", "files": {"a.xyz": "TEXT"}}, BadRequest, "unknown type"),
        ({"model": "m", "files": {"a.json": "TEXT"}}, BadRequest, "supplied file was not in GGUF format"),
        (
            {"model": "m", "files": {"model.safetensors": ZERO}},
            BadRequest,
            "creating a model from safetensors is not supported yet: model.safetensors",
        ),
        (
            {"model": "m", "files": {"w.gguf": "GGUF"}, "quantize": "q4_K_M"},
            BadRequest,
            "quantization (quantize) when a model is created is not supported yet",
        ),
        ({"model": "m", "from": "base", "draft_quantize": "q8_0"}, BadRequest, "--draft-quantize requires a DRAFT model"),
        ({"model": "m", "from": "base", "remote_host": "h"}, BadRequest, "remote models (remote_host) are not supported yet"),
        (
            {"model": "m", "from": "base", "adapters": {"a": ZERO, "b": ZERO}},
            BadRequest,
            "only one adapter is currently supported",
        ),
        (
            {"model": "m", "from": "base", "adapters": {"a.gguf": "GGUF"}},
            BadRequest,
            "the adapter is not a LoRA adapter in GGUF format",
        ),
        (
            {"model": "m", "from": "base", "files": {"a.gguf": "GGUF"}},
            BadRequest,
            "both 'from' and 'files' give the weights of the model",
        ),
        ({"model": "m", "files": {"a.gguf": "LORA"}}, BadRequest, "no base model was found"),
        ({"model": "m", "from": "base", "template": "{{ .Prompt"}, TemplateError, None),
        ({"model": "m", "from": "base", "template": "{{ nope .Prompt }}"}, TemplateError, None),
        ({"model": "m", "from": "base", "license": 5}, BadRequest, "license must be a string or a list of strings"),
        ({"model": "m", "from": "base", "requires": "x"}, BadRequest, "requires must be a valid semver (e.g. 0.14.0)"),
        (
            {"model": "m", "from": "base", "parameters": {"stop": "x"}},
            BadRequest,
            'option "stop" must be of type array',
        ),
        ({"model": "m", "from": "base", "info": {"base_name": 1}}, BadRequest, 'info field "base_name" must be a string'),
        (
            {"model": "m", "from": "base", "info": {"context_length": 1.5}},
            BadRequest,
            'info field "context_length" must be a non-negative integer',
        ),
        (
            {"model": "m", "from": "base", "info": {"capabilities": [1]}},
            BadRequest,
            'info field "capabilities" must be an array of strings',
        ),
        ({"model": "m", "modelfile": "SYSTEM x"}, BadRequest, "no FROM line"),
        ({"model": "m", "modelfile": "FROM /etc/passwd"}, BadRequest, "invalid model name"),
        (
            {"model": "m", "modelfile": "FROM base\nADAPTER /etc/passwd"},
            BadRequest,
            "ADAPTER must be the digest of an uploaded blob",
        ),
    ],
)
def test_errors(library: Library, tmp_path: Path, fields: dict[str, Any], error: type[OllamapyError], text: str | None) -> None:
    base(library, tmp_path)
    (tmp_path / "text").write_text("not a model")
    known = {"TEXT": upload(library, tmp_path / "text"), "GGUF": gguf(library, tmp_path)}
    known["LORA"] = gguf(library, tmp_path, "l.gguf", general__type="adapter")
    for name in ("files", "adapters"):
        if name in fields:
            fields = {**fields, name: {path: known.get(digest, digest) for path, digest in fields[name].items()}}
    before = library.manifests.path(ModelName.parse("base")).read_bytes()
    with pytest.raises(error) as caught:
        create(library, **fields)
    assert text is None or str(caught.value) == text
    assert caught.value.status in (400, 404)
    assert [model.name.short() for model in library.list()] == ["base:latest"]
    assert library.manifests.path(ModelName.parse("base")).read_bytes() == before


def test_broken_gguf_names_the_users_file(library: Library, tmp_path: Path) -> None:
    digest = gguf(library, tmp_path)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "w.gguf").read_bytes()[:-100])
    files = {"cut.gguf": upload(library, tmp_path / "cut.gguf")}
    with pytest.raises(GGUFError, match=r"^cut\.gguf: ") as caught:
        create(library, model="m", files=files)
    assert "blobs" not in str(caught.value) and digest[7:20] not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (15_500, "16K"),
        (134_515_008, "134.52M"),
        (135_000_000, "135M"),
        (3_212_749_888, "3.2B"),
        (7_000_000_000, "7B"),
        (671_026_419_200, "671.0B"),
    ],
)
def test_parameter_size_text(count: int, text: str) -> None:
    assert human_number(count) == text


def test_real_models(library: Library, smollm2_path: Path, gemma3_path: Path) -> None:
    for path, expected in ((smollm2_path, ("llama", "134.52M", "Q4_1")), (gemma3_path, ("gemma3", "268.10M", "Q4_K_M"))):
        digest = library.blobs.import_file(path)
        assert digest.hex == hashlib.sha256(path.read_bytes()).hexdigest()
        create(library, model=path.stem[:20], files={path.name: digest.text})
        config = opened(library, path.stem[:20]).config
        assert (config.model_family, config.model_type, config.file_type) == expected
