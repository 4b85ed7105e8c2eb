"""Making a model: from another model, from GGUF blobs, with templates, parameters and texts of its own.

Knows nothing of HTTP: takes a request, reports progress, raises. Never reads a path that a client names.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Any

import msgspec

from ollamapy import modelfile
from ollamapy.api.options import OPTIONS, coerce
from ollamapy.api.types import CreateRequest, Progress
from ollamapy.chat.gotemplate import Template
from ollamapy.convert.adapter import AdapterConfig, write_adapter
from ollamapy.convert.safetensors import SafetensorsFile
from ollamapy.errors import BadRequest
from ollamapy.gguf.reader import GGUFFile
from ollamapy.names import ModelName, split_source
from ollamapy.store import manifests
from ollamapy.store.digest import Digest
from ollamapy.store.gguf_layers import BESIDE, GGUFLayer, read_layers
from ollamapy.store.library import Library, LocalModel
from ollamapy.store.manifests import ConfigBlob, Layer, Manifest

Report = Callable[[Progress], None]

MAX_CONFIG = 1 << 20  # bytes of an adapter_config.json
_WEIGHTS = (manifests.MODEL, manifests.TENSOR)


def create_model(request: CreateRequest, library: Library, progress: Report) -> None:
    """Makes the model; when this returns it is durable, and "success" was reported.

    Raises BadRequest and its kin for what is wrong with the request, NotFound for a missing base, StoreError.
    """
    name = ModelName.parse(request.target)
    if request.modelfile:
        request = _with_modelfile(request)
    licenses = _check(request)
    base = _open_base(request, library)
    used = {Digest.parse(text) for files in _file_maps(request) for text in files.values()}
    with library.lease(used | base.manifest.blobs() if base else used):
        config, layers = _collected(request, library, base, progress)
        config = _apply_info(config, request.info)
        layers = _own_layers(request, library, layers, licenses, progress)
        config.rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
        encoded = config.encode()
        digest, _ = library.blobs.add(encoded)
        progress(Progress(status="writing manifest"))
        library.write(name, Manifest(Layer(manifests.CONFIG_TYPE, digest.text, len(encoded)), layers))
    progress(Progress(status="success"))


def _file_maps(request: CreateRequest) -> list[dict[str, str]]:
    return [files for files in (request.files, request.adapters, request.draft_files) if files]


def _with_modelfile(request: CreateRequest) -> CreateRequest:
    """The request with the instructions of its Modelfile where it has no field of its own.

    FROM, ADAPTER and DRAFT name models and uploaded blobs, never files: of a path, as `show --modelfile` prints it,
    only the digest at its end counts.
    """
    parsed = modelfile.parse(request.modelfile)
    fields, _ = modelfile.to_fields(parsed)
    for name, args, _ in parsed.commands:
        if name in ("from", "adapter", "draft"):
            last = posixpath.basename(args)
            if last.startswith("sha256"):
                field = {"from": "files", "adapter": "adapters", "draft": "draft_files"}[name]
                fields.setdefault(field, {})[last.replace(":", "-")] = Digest.parse(last).text
            elif name == "from":
                fields["from"] = args
            else:
                raise BadRequest(f"{name.upper()} must be the digest of an uploaded blob")
    own = msgspec.to_builtins(request)
    return msgspec.convert({**fields, **{key: value for key, value in own.items() if value}}, CreateRequest)


def _check(request: CreateRequest) -> list[str]:
    """Everything that can be refused before the store is touched. Returns the licences."""
    if request.draft_quantize and not request.draft_files:
        raise BadRequest("--draft-quantize requires a DRAFT model")
    if request.quantize or request.quantization or request.draft_quantize:
        raise BadRequest("quantization (quantize) when a model is created is not supported yet")
    if request.remote_host:
        raise BadRequest("remote models (remote_host) are not supported yet")
    for files in _file_maps(request):
        for path, digest in files.items():
            parts = path.split("/")
            if not path or "\\" in path or ":" in path or any(part in ("", ".", "..") for part in parts):
                raise BadRequest("file path must be relative")
            Digest.parse(digest)
    if sum(not name.endswith(BESIDE) for name in request.adapters) > 1:
        raise BadRequest("only one adapter is currently supported")
    if request.requires:
        modelfile.parse_version(request.requires)
    if request.template:
        Template.parse(request.template)
    for option, value in request.parameters.items():
        if option in OPTIONS and value is not None:
            coerce(option, value)
    licenses = [request.license] if isinstance(request.license, str) else request.license or []
    if not isinstance(licenses, list) or not all(isinstance(text, str) for text in licenses):
        raise BadRequest("license must be a string or a list of strings")
    return [text for text in licenses if text]


def _open_base(request: CreateRequest, library: Library) -> LocalModel | None:
    if not request.base and not request.files:
        raise BadRequest("neither 'from' or 'files' was specified")
    text, source = split_source(request.base)
    if source == "cloud":
        raise BadRequest("remote models (:cloud) are not supported yet")
    return library.open(ModelName.parse(text)) if request.base else None


def _collected(
    request: CreateRequest, library: Library, base: LocalModel | None, progress: Report
) -> tuple[ConfigBlob, list[Layer]]:
    """Config and layers of the base model and of the files, before the request's own texts."""

    def parsing() -> None:
        progress(Progress(status="parsing GGUF"))

    config, layers = ConfigBlob(), list[Layer]()
    if base is not None:
        config = base.config
        layers = [msgspec.structs.replace(layer, source=base.name.short()) for layer in base.manifest.layers]
    found = read_layers(library.blobs, request.files, parsing, may_be_empty=base is not None)
    if base and any(layer.media_type == manifests.MODEL for layer in found):
        raise BadRequest("both 'from' and 'files' give the weights of the model")
    if request.adapters:
        adapters = read_layers(library.blobs, _as_gguf(request, library, base, found, progress), parsing)
        if any(layer.media_type != manifests.ADAPTER for layer in adapters):
            raise BadRequest("the adapter is not a LoRA adapter in GGUF format")
        found, layers = found + adapters, _without(layers, manifests.ADAPTER)
    if request.draft_files:
        drafts = read_layers(library.blobs, request.draft_files, parsing)
        found += [layer._replace(media_type=manifests.DRAFT) for layer in drafts]
        layers = _without(layers, manifests.DRAFT)
    for layer in found:
        _describe(config, layer)
    layers = layers + [Layer(layer.media_type, layer.digest.text, layer.size) for layer in found]
    if not any(layer.media_type in _WEIGHTS for layer in layers) and not config.remote_host:
        raise BadRequest("no base model was found")
    config.renderer = request.renderer or config.renderer
    config.parser = request.parser or config.parser
    config.requires = request.requires.removeprefix("v") or config.requires
    return config, layers


def _as_gguf(
    request: CreateRequest, library: Library, base: LocalModel | None, found: list[GGUFLayer], progress: Report
) -> dict[str, str]:
    """The files of the adapter, with one in safetensors converted for the base model to a new blob."""
    names = [name for name in request.adapters if name.endswith(".safetensors")]
    if not names:
        return request.adapters
    blobs = library.blobs
    own = [blobs.path(layer.digest) for layer in found if layer.media_type == manifests.MODEL]
    model = base.model_path if base is not None else next(iter(own), None)
    if model is None:
        raise BadRequest("no base model was found")
    config = next((text for name, text in request.adapters.items() if posixpath.basename(name) == "adapter_config.json"), None)
    if config is None:
        raise BadRequest(f"an adapter in safetensors needs its adapter_config.json beside it: {names[0]}")
    for text in (config, request.adapters[names[0]]):
        if not blobs.has(Digest.parse(text)):
            raise BadRequest(f"blob not found for the adapter (digest {text})")
    progress(Progress(status="converting adapter"))
    parsed = AdapterConfig.parse(blobs.read(Digest.parse(config), MAX_CONFIG))
    file = SafetensorsFile(blobs.path(Digest.parse(request.adapters[names[0]])), names[0])
    blobs.check_space(2 * file.num_bytes)
    with GGUFFile.open(model) as opened:
        digest = blobs.import_made(lambda path: write_adapter(path, parsed, file, opened), "convert an adapter")
    return {"adapter.gguf": digest.text}


def _describe(config: ConfigBlob, layer: GGUFLayer) -> None:
    """Writes into the config what `list` and `show` say of weights and projectors."""
    if layer.media_type == manifests.MODEL:
        config.model_format = config.model_format or "gguf"
        config.model_family = config.model_family or layer.architecture
        config.model_type = config.model_type or human_number(layer.num_parameters)
        config.file_type = config.file_type or layer.file_type
        config.context_length = config.context_length or layer.context_length
        config.embedding_length = config.embedding_length or layer.embedding_length
    if layer.media_type in (manifests.MODEL, manifests.PROJECTOR):
        families = config.model_families or []
        config.model_families = families if layer.architecture in families else [*families, layer.architecture]
    if layer.media_type == manifests.DRAFT:
        config.draft = {"model_format": "gguf", "architecture": layer.architecture}


def human_number(count: int) -> str:
    """A parameter count as Ollama shows it: 134.52M, 3.2B, 7B, 15K."""
    for unit, size, decimals in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if count >= size:
            return f"{count / size:.{decimals if count % size else 0}f}{unit}"
    return str(count)


def _apply_info(config: ConfigBlob, info: dict[str, Any]) -> ConfigBlob:
    """The config with what `info` says in place of what was found; BadRequest for a value of the wrong type."""
    for key, (field, is_right, expected) in _INFO.items():
        if key in info:
            if not is_right(info[key]):
                raise BadRequest(f'info field "{key}" must be {expected}')
            setattr(config, field, int(info[key]) if is_right is _is_count else info[key])
    if "model_family" in info:
        config.model_families = [config.model_family] if config.model_family else None
    return config


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and int(value) == value


_INFO: dict[str, tuple[str, Callable[[Any], bool], str]] = {  # key -> field of the config, check, what it must be
    "capabilities": ("capabilities", _is_texts, "an array of strings"),
    "model_family": ("model_family", _is_text, "a string"),
    "base_name": ("base_name", _is_text, "a string"),
    "quantization_level": ("file_type", _is_text, "a string"),
    "parameter_size": ("model_type", _is_text, "a string"),
    "context_length": ("context_length", _is_count, "a non-negative integer"),
    "embedding_length": ("embedding_length", _is_count, "a non-negative integer"),
}


def _own_layers(
    request: CreateRequest, library: Library, layers: list[Layer], licenses: list[str], progress: Report
) -> list[Layer]:
    """The layers with the request's texts put in. Reports each layer as new or existing."""
    new: set[str] = set()

    def layer(media_type: str, data: bytes) -> Layer:
        digest, created = library.blobs.add(data)
        if created:
            new.add(digest.text)
        return Layer(media_type, digest.text, len(data))

    if request.template:
        layers = _without(layers, manifests.TEMPLATE, manifests.PROMPT)
        layers.append(layer(manifests.TEMPLATE, request.template.encode()))
    if request.system:
        layers = [*_without(layers, manifests.SYSTEM), layer(manifests.SYSTEM, request.system.encode())]
    layers = layers + [layer(manifests.LICENSE, text.encode()) for text in licenses]
    if request.parameters:
        merged = _inherited_params(library, layers) | request.parameters
        layers = [*_without(layers, manifests.PARAMS), layer(manifests.PARAMS, msgspec.json.encode(merged))]
    if request.messages:
        data = msgspec.json.encode([{"role": m.role, "content": m.content or ""} for m in request.messages])
        layers = [*_without(layers, manifests.MESSAGES), layer(manifests.MESSAGES, data)]
    for done in layers:
        progress(Progress(status=f"{'creating new' if done.digest in new else 'using existing'} layer {done.digest}"))
    return layers


def _inherited_params(library: Library, layers: list[Layer]) -> dict[str, Any]:
    params = [layer for layer in layers if layer.media_type == manifests.PARAMS]
    return msgspec.json.decode(library.blobs.read(params[-1].blob, params[-1].size), type=dict[str, Any]) if params else {}


def _without(layers: list[Layer], *media_types: str) -> list[Layer]:
    return [layer for layer in layers if layer.media_type not in media_types]
