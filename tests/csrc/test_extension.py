"""The extension as users meet it: built lazily, kept, switched off, impossible; and its op under every instruction set."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ollamapy import _build, env, extension
from ollamapy.extension import find_library
from tests.csrc import check_ops

ROOT = Path(__file__).parents[2]
TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
HAVE_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
needs_compiler = pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler on this machine")

REPORT = "from ollamapy import extension as e; print(e.load() is not None, e.status(), e.isa(), sep='|')"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )


def report(**variables: str) -> tuple[list[str], str]:
    done = run("-c", REPORT, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|"), done.stderr


@pytest.fixture(scope="session")
def ops() -> Any:
    """The ops of this tree's sources: from the prebuilt library, or the user's cache, built there when missing."""
    loaded = extension.load()
    if loaded is None:
        pytest.skip(extension.status())
    return loaded


def test_the_op_equals_the_reference_under_every_instruction_set(ops: Any) -> None:
    possible, before = ops.cpu_isas().split(), extension.isa()
    assert possible[-1] == "base" and set(possible) <= set(_build.isas())
    try:
        for isa in possible:
            assert ops.cpu_isa(isa) == isa
            check_ops.check_all()
    finally:
        ops.cpu_isa(before)


def test_the_environment_forces_an_instruction_set(ops: Any) -> None:
    done = run("-m", "tests.csrc.check_ops", OLLAMAPY_CPU_ISA="base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base|16|")


def test_an_impossible_instruction_set_is_reported_and_ignored(ops: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot run 'avx1024' here"):
        ops.cpu_isa("avx1024")
    outcome, errors = report(OLLAMAPY_CPU_ISA="avx1024")
    assert outcome[0] == "True" and outcome[2] == ops.cpu_isas().split()[0]
    assert "ignoring OLLAMAPY_CPU_ISA=avx1024" in errors


def test_switched_off(tmp_path: Path) -> None:
    outcome, errors = report(OLLAMAPY_NO_EXTENSION="1", XDG_CACHE_HOME=str(tmp_path))
    assert outcome == ["False", "off", ""] and errors == "" and not list(tmp_path.iterdir())


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """The package without a prebuilt library, so that only the cache can have one."""
    shutil.copytree(ROOT / "ollamapy", tmp_path / "tree" / "ollamapy", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", tmp_path / "tree" / "csrc")
    return tmp_path / "tree"


def copy_report(tree: Path, **variables: str) -> tuple[list[str], str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), **variables}
    done = subprocess.run(
        [sys.executable, "-c", REPORT], env=environment, cwd=tree, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|"), done.stderr


def test_without_a_compiler_there_is_one_warning_and_no_crash(source_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    outcome, errors = copy_report(source_copy, PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(tmp_path / "cache"), CXX="")
    assert outcome[:2] == ["False", "unavailable: no C++ compiler found (g++, c++ or clang++)"]
    assert errors.count("the C++ kernels are unavailable") == 1


def test_a_failing_compiler_is_remembered(source_copy: Path, tmp_path: Path) -> None:
    compiler, calls = tmp_path / "broken-g++", tmp_path / "calls"
    compiler.write_text(f"#!/bin/sh\necho called >> {calls}\necho 'error: no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first, errors = copy_report(source_copy, **variables)
    assert first[0] == "False" and "error: no such flag" in errors
    before = calls.read_text()
    second, errors = copy_report(source_copy, **variables)
    assert second[0] == "False" and "failed before" in errors and calls.read_text() == before


@needs_compiler
def test_built_on_first_use_once_even_by_two_processes(source_copy: Path, tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(source_copy), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables["OLLAMAPY_CPU_ISA"] = "base"  # the quickest to compile
    racers = [
        subprocess.Popen([sys.executable, "-c", REPORT], env=variables, cwd=source_copy, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for racer in racers:
        output, _ = racer.communicate(timeout=240)
        assert output == "True|built on first use|base\n"
    files = sorted(path.name for path in (tmp_path / "cache" / "ollamapy").glob("*/*"))
    assert files == ["_C.abi3.so", "lock"]
    library = next((tmp_path / "cache").rglob("_C.abi3.so"))
    assert _build.built_from(library) == _build.source_hash(source_copy / "csrc")


def test_a_library_of_other_sources_is_not_used(source_copy: Path, tmp_path: Path) -> None:
    package, cache = source_copy / "ollamapy", tmp_path / "cache"
    settings = env.load({"XDG_CACHE_HOME": str(cache), "CXX": "no-such-compiler"})
    source_hash = _build.source_hash(source_copy / "csrc")
    prebuilt = package / _build.LIBRARY
    prebuilt.write_bytes(b"\x7fELF ... ollamapy-sources:" + source_hash.encode() + b"\0")
    assert find_library(package, settings) == (prebuilt, "prebuilt")
    with open(source_copy / "csrc" / "ops.cpp", "a") as file:
        file.write("// changed after the build\n")
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler found \(no-such-compiler\)"):
        find_library(package, settings)
    kept = cache / "ollamapy" / f"{_build.source_hash(source_copy / 'csrc')}-{_build.isas_for_here()[0]}" / _build.LIBRARY
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert find_library(package, settings) == (kept, "built on first use")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang, a compiler for other machines")
def test_the_sources_compile_for_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build.platform, "machine", lambda: "aarch64")
    assert list(_build.isas()) == ["base"]
    zig = (sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu")
    commands = _build.compile_commands(ROOT / "csrc", TORCH, "", ("base",))
    objects = _build.compile_all(tmp_path, {name: [*zig, *command[1:], "-O1"] for name, command in commands.items()})
    for path in objects:
        assert Path(path).read_bytes()[18:20] == b"\xb7\0", "not for aarch64"


def test_an_empty_library_is_not_used(source_copy: Path, tmp_path: Path) -> None:
    (source_copy / "ollamapy" / _build.LIBRARY).touch()
    outcome, errors = copy_report(source_copy, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert outcome[:2] == ["False", "unavailable: no C++ compiler found (no-such-compiler)"]
    assert errors.count("the C++ kernels are unavailable") == 1 and "Traceback" not in errors


def test_the_library_asks_for_every_feature_that_it_was_compiled_for() -> None:
    asked = (ROOT / "csrc" / "cpu" / "select.cpp").read_text()
    for isa in _build.X86_ISAS.values():
        for feature in isa.features:
            name = feature.replace("avx512_", "avx512")
            assert f'__builtin_cpu_supports("{name}")' in asked or f"bit_{name.upper()}" in asked, feature


def test_every_source_belongs_to_one_object_per_instruction_set() -> None:
    commands = _build.compile_commands(ROOT / "csrc", TORCH, "g++", tuple(_build.isas()))
    own = [name for name, isa in _build.isas().items() if not isa.kernels_of]
    for path in (path for path in _build.cpu_files(ROOT / "csrc") if path.suffix == ".cpp"):
        count = sum(command[-1] == str(path) for command in commands.values())
        if path.stem == "table":
            assert count == len(_build.isas())
        else:
            assert count == (len(own) if path.parent.name == "isa" else 1), path


def test_a_lazy_build_is_for_one_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu(*flags: str) -> None:
        monkeypatch.setattr(_build.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: fpu {' '.join(flags)}\nbugs\t\t: x\n")

    features = {name: isa.features for name, isa in _build.X86_ISAS.items()}
    cpu(*features["avx512bf16"])
    assert _build.isas_for_here() == ("avx512bf16", "avx512vnni")
    assert _build.isas_for_here("avx2") == ("avx2",) and _build.isas_for_here("avx1024") == ("avx512bf16", "avx512vnni")
    cpu(*features["avx512vnni"])
    assert _build.isas_for_here() == _build.isas_for_here("avx512bf16") == ("avx512vnni",)
    cpu(*features["avx2"], "avx512f", "avx512_vnni")
    assert _build.isas_for_here() == _build.isas_for_here("avx512vnni") == ("avx2",)
    cpu("avx2")
    assert _build.isas_for_here() == ("base",)
    monkeypatch.setattr(_build.platform, "machine", lambda: "aarch64")
    assert _build.isas_for_here() == ("base",)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_sources_compile_without_warnings_and_keep_instruction_sets_apart(tmp_path: Path) -> None:
    """A weak symbol in a file compiled for AVX-512 could be the copy that the linker keeps for every CPU. Optimization only
    removes some of them, and takes five times as long."""

    def check(name: str, command: list[str]) -> None:
        strict = [*command, "-O0", "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / name)]
        done = subprocess.run(strict, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if isa := next((flag.split("=")[1] for flag in command if flag.startswith("-DOLLAMAPY_TABLE=")), ""):
            symbols = subprocess.run(["nm", "-C", str(tmp_path / name)], capture_output=True, text=True, check=True).stdout
            assert not re.findall(r"^\S* +[WVu] .*$", symbols, re.MULTILINE), name
            defined = re.findall(r"^\S+ +[A-TX-Z] (.*)$", symbols, re.MULTILINE)
            assert defined and all(symbol.startswith(f"ollamapy::{isa}::") for symbol in defined), defined

    commands = _build.compile_commands(ROOT / "csrc", TORCH, _build.find_compiler(), tuple(_build.isas()))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, commands, commands.values()))


def test_the_sources_ship_with_the_package(tmp_path: Path) -> None:
    """What setup.py lists for a wheel: every source below its package."""
    code = (
        "import setuptools, runpy; found = {};"
        "setuptools.setup = lambda **given: found.update(given);"
        "runpy.run_path('setup.py'); print(*sorted(found['packages']), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = set(done.stdout.split())
    assert {"ollamapy", "ollamapy.gguf", "ollamapy.quant", "ollamapy.triton_kernels"} <= packages
    for path in (ROOT / "csrc").rglob("*.cpp"):
        folder = path.parent.relative_to(ROOT)
        assert ".".join(("ollamapy", *folder.parts)) in packages
