"""What the daemon itself needs of a model file: config, metadata, tensors, tokenizer. Read in threads, cached."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollamapy.gguf.dialect import normalise
from ollamapy.gguf.reader import GGUFFile, TensorInfo
from ollamapy.models.config import ModelConfig
from ollamapy.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_FILES = 4  # a tokenizer of 262k tokens takes about 100 MB and a second
MAX_ARRAY = 256  # elements; longer metadata arrays are vocabularies, which the tokenizer has read
Key = tuple[str, int, int]  # path, mtime in ns, size


@dataclass(frozen=True, slots=True)
class ModelFile:
    """`metadata` and `tensors` are in llama.cpp's spelling, without vocabulary; `tokenizer` may still be being built."""

    config: ModelConfig
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tokenizer: asyncio.Future[Tokenizer]


class ModelFiles:
    """The files used last. A reload after keep_alive has run out does not build the tokenizer again."""

    def __init__(self) -> None:
        self._files: OrderedDict[Key, ModelFile] = OrderedDict()

    async def open(self, path: Path) -> ModelFile:
        """Reads the header and begins to build the tokenizer. Raises OSError, GGUFError, UnsupportedModel."""
        status = await asyncio.to_thread(path.stat)
        key = (str(path), status.st_mtime_ns, status.st_size)
        file = self._files.pop(key, None)
        if file is None:
            file = await self._read(key, path)
        self._files[key] = file
        if len(self._files) > MAX_FILES:
            self._files.popitem(last=False)
        return file

    async def _read(self, key: Key, path: Path) -> ModelFile:
        opened = await asyncio.to_thread(GGUFFile.open, path)
        metadata, tensors = normalise(opened.metadata, opened.tensors)
        try:
            config = ModelConfig.from_gguf(metadata)
        except BaseException:
            opened.close()
            raise
        short = [name for name in metadata if (opened.metadata.array_length(name) or 0) <= MAX_ARRAY]
        kept = {name: metadata[name] for name in short}
        tokenizer = asyncio.ensure_future(asyncio.to_thread(_build_tokenizer, opened, metadata))

        def forget_a_failure(done: asyncio.Future[Tokenizer]) -> None:
            if done.cancelled() or done.exception() is not None:
                self._files.pop(key, None)

        tokenizer.add_done_callback(forget_a_failure)
        return ModelFile(config, kept, tensors, tokenizer)


def _build_tokenizer(file: GGUFFile, metadata: Mapping[str, Any]) -> Tokenizer:
    start = time.monotonic()
    embedding = file.tensors.get("token_embd.weight")
    with file:
        tokenizer = Tokenizer.from_gguf(metadata, embedding_rows=embedding.shape[0] if embedding else None)
    log.debug("%s: tokenizer built in %.2f s", file.path, time.monotonic() - start)
    return tokenizer
