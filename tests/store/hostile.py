"""Texts that are no digests, as a hostile registry or client may send them; and a run of all of them through the store.

`python -m tests.store.hostile ROOT` puts each text in every place where the store or a create reads a digest, under an
audit hook that notes every path that is opened, made, renamed or removed. Prints the paths outside ROOT and the counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ollamapy.chat.gotemplate  # all imports are done before the audit begins
import ollamapy.gguf.writer  # noqa: F401
from ollamapy.api.types import CreateRequest
from ollamapy.create import create_model
from ollamapy.errors import OllamapyError
from ollamapy.names import ModelName
from ollamapy.store.digest import Digest
from ollamapy.store.library import Library
from tests.store.stores import make, name

HEX = hashlib.sha256(b"abc").hexdigest()
ZERO = "0" * 64
HOSTILE = [
    *("", "sha256", "sha256:", "sha256-", "other", ".", "..", "/", "~", "*", "\0", "\n", HEX, f":{HEX}", f"sha256{HEX}"),
    *(f"{prefix}{ZERO}" for prefix in ("md5:", "sha1:", "sha512:", "SHA256:", "Sha256-", "sha256_", "sha256/", "sha256 :")),
    *(f"sha256:{'0' * n}" for n in (1, 12, 63, 65, 66, 128, 4096, 100_000)),
    *("../../etc/passwd", "/etc/passwd", "sha256:../../etc/passwd", "sha256-../../../etc/passwd", "sha256:/etc/passwd"),
    *(f"sha256:{'../' * n}x".ljust(71, "0") for n in range(1, 22, 4)),
    *(f"../sha256:{ZERO}", f"/sha256:{ZERO}", f"sha256:{ZERO}/..", f"sha256:{ZERO}/../../x", f"./sha256-{ZERO}"),
    *(f"sha256:{ZERO}{end}" for end in ("\n", " ", "\0", "/", "\\", ".", "-partial", "-partial-0", "\r\n", "\u200b")),
    *(f"{start}sha256:{ZERO}" for start in (" ", "\n", "\0", "\ufeff", "x", "sha256:")),
    *("sha256:" + char * 64 for char in ("g", ".", "/", "\\", "\0", "-", "٠", "０", "é", "\uff41", " ")),
    "sha256:" + "%2e%2e%2f" * 7 + "0",
    "sha256:" + "0" * 60 + "/../",
    "..\\..\\windows\\system32",
    "sha256:C:\\" + "0" * 61,
    "file:///etc/passwd",
    "sha256:$(touch x)".ljust(71, "0"),
    "sha256:" + "0" * 63 + "\n",
    "sha256::" + "0" * 63,
]

EVENTS = {
    *("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"),
    *("os.listdir", "os.scandir", "os.utime", "shutil.move", "shutil.copyfile", "shutil.rmtree"),
}


def attack(library: Library, text: str) -> None:
    """One hostile text in each place. Errors of the package are as they should be; anything else is a bug."""
    good = library.open(name("good"))
    for change in ("config", "layers", "both"):
        document = json.loads(good.manifest.encode())
        if change != "layers":
            document["config"]["digest"] = text
        if change != "config":
            document["layers"][0]["digest"] = text
        path = library.manifests.path(name("evil"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        for operation in (
            lambda: library.list(),
            lambda: library.open(name("evil")),
            lambda: library.copy(name("evil"), name("copy")),
            lambda: library.check(deep=True),
            lambda: library.prune(),
            lambda: make(library, "evil"),
            lambda: library.delete(name("evil")),
        ):
            with contextlib.suppress(OllamapyError):
                operation()
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document))
        library.delete(name("evil"))
    requests: list[dict[str, Any]] = [
        {"files": {"a.gguf": text}},
        {"files": {text: good.manifest.layers[0].digest}},
        {"base": "good", "adapters": {"a.gguf": text}},
        {"base": "good", "draft_files": {"a.gguf": text}},
        {"base": text},
        {"modelfile": f"FROM {text}"},
        {"modelfile": f"FROM /x/{text}"},
        {"modelfile": f"FROM good\nADAPTER {text}"},
    ]
    for fields in requests:
        with contextlib.suppress(OllamapyError):
            create_model(CreateRequest(model="new", **fields), library, lambda progress: None)
    for parse in (Digest.parse, ModelName.parse):
        with contextlib.suppress(OllamapyError):
            parse(text)


def main(root: Path) -> None:
    logging.disable()
    library = Library(root)
    make(library, "good")
    seen: set[str] = set()
    attacking = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if attacking and event in EVENTS:
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            seen.update(os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | os.PathLike))

    sys.addaudithook(hook)
    for text in HOSTILE:
        attack(library, text)
    attacking = False
    outside = sorted(path for path in seen if not Path(path).is_relative_to(root))
    whole = [model.name.short() for model in library.list()] == ["good:latest"] and not library.check(deep=True)
    print(json.dumps({"texts": len(HOSTILE), "paths": len(seen), "outside": outside, "whole": whole}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
