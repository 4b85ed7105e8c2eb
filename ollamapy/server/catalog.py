"""What handlers share: the settings, the store, the loaded models; and finding the model that a request names."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from ollamapy.api.types import Details, TensorEntry
from ollamapy.chat.capabilities import CHAT_TEMPLATE, capabilities, parse_go, prefers_jinja
from ollamapy.chat.format import ChatFormat, SpecialTokens, choose
from ollamapy.env import Settings
from ollamapy.errors import BadRequest, NotFound, NotSupported, TemplateError
from ollamapy.gguf.reader import GGUFFile
from ollamapy.lifecycle.resident import LoadedModel
from ollamapy.lifecycle.residents import Residents
from ollamapy.names import ModelName, split_source
from ollamapy.server.record import current
from ollamapy.server.structured import Formats
from ollamapy.store.library import Library, LocalModel
from ollamapy.store.manifests import MODEL, ConfigBlob, Manifest

_MAX_CACHED = 64
_SHORT_ARRAY = 5  # elements; longer ones are left out of `show` unless it is verbose


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that outlives a request."""

    settings: Settings
    library: Library
    residents: Residents
    formats: Formats = field(default_factory=Formats)
    _capabilities: OrderedDict[str, list[str]] = field(default_factory=OrderedDict)
    _formats: OrderedDict[tuple[str, str], ChatFormat] = field(default_factory=OrderedDict)

    async def open(self, text: str) -> LocalModel:
        """The model of a name as a request has it. Raises BadRequest, NotFound, NotSupported."""
        model = await asyncio.to_thread(self.library.open, parse_name(text))
        current().begin(model.name.short())
        return model

    async def capabilities(self, model: LocalModel, read: Mapping[str, Any] | None = None) -> list[str]:
        """What the model can do, kept by its digest. `read`: its file's metadata; without it the file is opened as for the load
        that follows, which then finds it open: a header with a large vocabulary takes up to 30 ms. Raises what that raises."""
        known = self._capabilities.get(model.digest)
        if known is None:
            metadata = read if read is not None else await self.residents.metadata(model)
            extra = model.config.capabilities
            known = capabilities(metadata, model.template, bool(model.projector_paths), extra, self.settings.go_template)
            _remember(self._capabilities, model.digest, known)
        return known

    def format(self, model: LoadedModel[LocalModel], request_template: str = "") -> ChatFormat:
        """The chat format of a model, made once per template. Raises TemplateError."""
        key = (model.model.digest, request_template)
        found = self._formats.get(key)
        if found is None:
            found = choose(
                template=model.model.template,
                metadata=model.metadata,
                go_template=self.settings.go_template,
                special=_special_tokens(model),
                request_template=request_template or None,
                builtin=model.model.config.renderer or model.model.config.parser,
            )
            _remember(self._formats, key, found)
        return found


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


def parse_name(text: str) -> ModelName:
    """Raises NotFound for no name, BadRequest for an invalid one, NotSupported for a cloud model."""
    base, source = split_source(text)
    if source == "cloud":
        raise NotSupported(f"cloud models are not supported: {text}")
    if not base:
        raise NotFound(f"model '{text}' not found")
    return ModelName.parse(base)


def require_name(text: str) -> str:
    if not text:
        raise BadRequest("model is required")
    return text


def details(config: ConfigBlob, manifest: Manifest | None = None) -> Details:
    weights = manifest.of_type(MODEL) if manifest else []
    return Details(
        parent_model=weights[0].source if weights else "",
        format=config.model_format,
        family=config.model_family,
        families=config.model_families,
        parameter_size=config.model_type,
        quantization_level=config.file_type,
        context_length=config.context_length,
        embedding_length=config.embedding_length,
    )


def shown_template(model: LocalModel, metadata: Mapping[str, Any], go_template: bool | None) -> str:
    """The template that serves the model's chats: its Go TEMPLATE, or the Jinja of its GGUF."""
    jinja = str(metadata.get(CHAT_TEMPLATE) or "")
    if model.template is None:
        return jinja
    try:
        return jinja if prefers_jinja(parse_go(model.template), jinja, go_template) else model.template
    except TemplateError:
        return model.template


def read_model_info(path: Path, *, verbose: bool) -> tuple[dict[str, Any], list[TensorEntry]]:
    """Metadata and tensors of a GGUF as `show` has them, its chat template included; shapes are in the file's order."""
    with GGUFFile.open(path) as file:
        info: dict[str, Any] = {}
        for name in sorted(file.metadata):
            if name == "general.name":
                continue
            length = file.metadata.array_length(name)
            long = length is not None and length > _SHORT_ARRAY and not verbose
            info[name] = [] if long else _json_safe(file.metadata[name])
        info["general.parameter_count"] = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        tensors = [TensorEntry(t.name, t.type.name, list(reversed(t.shape))) for t in file.tensors.values()]
    return info, tensors


def _json_safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _special_tokens(model: LoadedModel[LocalModel]) -> SpecialTokens:
    tokenizer = model.tokenizer

    def text(id: int | None) -> str:
        return "" if id is None else tokenizer.token_text(id)

    others = frozenset(tokenizer.token_text(id) for id in tokenizer.eog_ids)
    return SpecialTokens(text(tokenizer.bos_id), text(tokenizer.eos_id), others)


def _remember(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > _MAX_CACHED:
        cache.popitem(last=False)
