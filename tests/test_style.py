"""The mechanical rules of the house: import direction, no torch where it would be felt, sizes of files and functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ollamapy"

# part of the package -> the parts it may import besides itself. Leaves: env, errors, names, gguf.
LEAVES = {"env", "errors", "names", "gguf", "__init__"}
MAY_IMPORT: dict[str, set[str]] = {
    "gguf": {"errors"},
    "env": set(),
    "cores": set(),
    "errors": set(),
    "names": {"errors"},
    "api": LEAVES,
    "modelfile": LEAVES | {"api", "store"},
    "create": LEAVES | {"api", "store", "modelfile", "chat", "convert", "quant"},
    "store": LEAVES | {"api"},
    "chat": LEAVES | {"api"},
    "tokenizer": LEAVES,
    "quant": LEAVES,
    "extension": LEAVES | {"_build", "cores"},
    "_build": set(),
    "_build_cuda": {"_build"},
    "cuda_extension": LEAVES | {"_build", "_build_cuda"},
    "cuda_kernels": LEAVES | {"quant", "engine", "cuda_extension", "cpu_kernels", "reference", "triton_kernels"},
    "reference": LEAVES | {"quant", "engine"},
    "cpu_kernels": LEAVES | {"quant", "engine", "extension", "reference", "cpu_memory", "cores"},
    "cpu_memory": set(),
    "kernel": LEAVES | {"quant"},
    "cpu_sampling": LEAVES | {"engine", "extension", "reference"},
    "kernel_table": LEAVES
    | {"quant", "kernel", "reference", "cpu_kernels", "cpu_sampling", "extension"}
    | {"cuda_kernels", "cuda_extension", "triton_kernels"},
    "ops": LEAVES | {"quant", "kernel", "kernel_table", "reference", "cpu_kernels", "extension", "engine"},
    "layers": LEAVES | {"ops", "quant", "models", "engine"},
    "models": LEAVES | {"layers", "ops", "quant", "engine"},
    "convert": LEAVES | {"quant", "models"},
    "engine": LEAVES | {"ops"},
    "lifecycle": LEAVES | {"engine", "models", "tokenizer", "api", "ops", "extension", "quant", "cores"},
    "server": LEAVES | {"api", "chat", "lifecycle", "store", "create", "modelfile", "tokenizer", "engine", "models"},
    "cli": LEAVES | {"api", "modelfile", "server", "store"},
    "__main__": {"cli"},
    "__init__": set(),
}
# These run in the daemon or the command line, where importing torch (1.3 s) would be felt.
NO_TORCH = (
    *("env", "errors", "names", "modelfile", "create", "api", "store", "cli", "gguf", "chat", "tokenizer", "server"),
    *("lifecycle", "models/__init__", "models/config", "engine/protocol", "quant/forms"),
)
TORCH_ALLOWED = {"lifecycle/worker.py"}

MAX_FILE_LINES = 300
FILE_EXEMPT: dict[str, int] = {}
MAX_FUNCTION_LINES = 60
FUNCTION_EXEMPT: dict[str, int] = {}
MAX_PARAMETERS = 8
PARAMETERS_EXEMPT: dict[str, int] = {}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name at the top level."""
    return name(path).split("/")[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path, *, with_type_checking: bool = True) -> Iterator[str]:
    """Dotted names of the modules that a file imports anywhere (inside functions too)."""
    skipped: set[ast.AST] = set()
    module = tree(path)
    if not with_type_checking:
        for node in ast.walk(module):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(ast.walk(node))
    for node in ast.walk(module):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{name(path)}: relative import; write ollamapy.*")


@pytest.mark.parametrize("path", sources(), ids=name)
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    targets = {target.split(".")[1] for target in imported(path) if target.startswith("ollamapy.")}
    upward = {t for t in targets - {own} if (PACKAGE / t).exists() or (PACKAGE / f"{t}.py").exists()} - MAY_IMPORT[own]
    assert not upward, f"{own} must not import {sorted(upward)}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_only_ops_imports_kernels(path: Path) -> None:
    modules = ("ollamapy.triton_kernels", "ollamapy.cpu_kernels", "ollamapy.cpu_sampling", "ollamapy.cuda_kernels")
    kernels = [t for t in imported(path) if t.startswith(modules)]
    assert not kernels or name(path) in ("ops.py", "kernel_table.py", "cuda_kernels.py")


def test_daemon_and_cli_import_no_torch() -> None:
    """Importing everything that the daemon and the command line load must not pull torch (or numpy, at import time) in."""
    modules = []
    for path in sources():
        stem = name(path).removesuffix(".py")
        if name(path) not in TORCH_ALLOWED and any(stem == p or stem.startswith(p + "/") for p in NO_TORCH):
            modules.append("ollamapy." + stem.replace("/", ".").removesuffix(".__init__"))
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_sizes(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= FILE_EXEMPT.get(name(path), MAX_FILE_LINES), f"{lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            key = f"{name(path)}:{node.name}"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_EXEMPT.get(key, MAX_FUNCTION_LINES), f"{key} has {length} lines"
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
            assert len(arguments) <= PARAMETERS_EXEMPT.get(key, MAX_PARAMETERS), f"{key} has {len(arguments)} parameters"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    assert path.name == "__init__.py" or ast.get_docstring(tree(path)), "a file says what it is"
    if name(path) != "env.py":
        assert "os.environ" not in text and "getenv" not in text, "the environment is read in env.py only"
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global), "no `global`"
        if isinstance(node, ast.ExceptHandler):
            swallows = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            assert not (swallows and broad), f"line {node.lineno}: a broad except that swallows"
    runs_data = r"\b(pickle|marshal)\b\.|torch\.load\(|(?<![\w.])eval\(|(?<![\w.])exec\("
    assert not re.search(runs_data, text), "nothing that runs data"


def test_only_known_exemptions() -> None:
    """An exemption that is no longer needed is removed."""
    for file, ceiling in FILE_EXEMPT.items():
        lines = (PACKAGE / file).read_text().count("\n")
        assert MAX_FILE_LINES < lines <= ceiling, file
