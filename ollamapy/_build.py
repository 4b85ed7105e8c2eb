"""Compiles csrc/ into one library, `_C.abi3.so`: ahead of time by setup.py for every instruction set of the architecture,
else on first use by `extension` for the CPU at hand.

Needs a C++20 compiler and the folder of an installed torch; imports neither torch nor setuptools, nor anything of ours
(setup.py loads this file before the package exists). The library is no Python module: it is loaded as a torch library.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "_C.abi3.so"
# Torch's stable ABI of 2.11: the library runs on that and everything later. A product is never contracted into a sum, so
# that every instruction set gives the same bits; kernels that want fused arithmetic say so with intrinsics.
# Nor do kernels look at floating point exceptions or errno: without those two flags rounding is a call into libm.
COMMON = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
)
LINK = ("-shared", "-s", "-pthread", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed")


@dataclass(frozen=True)
class InstructionSet:
    """`flags` for the compiler, `features` that /proc/cpuinfo must list. `kernels_of`: its table points at another set's."""

    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    kernels_of: str = ""


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi")
_AVX2 = InstructionSet(("-mavx2", "-mfma", "-mf16c", "-mbmi2"), ("avx2", "fma", "f16c", "bmi2"))
_VNNI = InstructionSet(
    (*_AVX2.flags, *(f"-m{part}" for part in _AVX512), "-mavx512vnni", "-mprefer-vector-width=512"),
    (*_AVX2.features, *_AVX512, "avx512_vnni"),
)
X86_ISAS = {  # best first, as csrc/cpu/select.cpp wants them
    # No kernel gains from bfloat16 dots yet: activations are int8 or float32.
    "avx512bf16": InstructionSet((*_VNNI.flags, "-mavx512bf16"), (*_VNNI.features, "avx512_bf16"), kernels_of="avx512vnni"),
    "avx512vnni": _VNNI,
    "avx2": _AVX2,
    "base": InstructionSet(("-O2",)),  # for CPUs before 2013, and for tests: compiles in half the time
}
"""What csrc/cpu/isa/ is compiled for, once per set."""

_MARKER = b"ollamapy-sources:"


class BuildError(Exception):
    """The library cannot be built here; the text says why."""


def isas() -> dict[str, InstructionSet]:
    """The instruction sets of this machine's architecture, best first."""
    return X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"base": InstructionSet()}


def isas_for_here(wanted: str = "") -> tuple[str, ...]:
    """What a build for this CPU alone holds: `wanted` if it can run here, else the best, and what that leans on."""
    try:
        listed = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        listed = None
    here = set(listed[1].split()) if listed else set()
    possible = [name for name, isa in isas().items() if here.issuperset(isa.features)]
    chosen = wanted if wanted in possible else possible[0]
    return tuple(name for name in (chosen, isas()[chosen].kernels_of) if name)


def find_sources(package: Path) -> Path:
    """csrc/: inside the package's folder when it was installed, beside it in a checkout."""
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def find_torch(*pythons: str) -> Path | None:
    """The folder of the torch that the target environment has, None when it has none.

    Asked of its interpreter with -I: inside pip's isolated build that leaves the overlay out and shows the environment.
    """
    code = (
        "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s and s.origin else '')"
    )
    for python in dict.fromkeys([sys.executable, *pythons]):
        if os.path.exists(python):
            found = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False).stdout.strip()
            if found:
                return Path(found)
    return None


def find_compiler(wanted: str = "") -> str:
    """Path of the C++ compiler: `wanted` (the environment's CXX), else the first of the usual names."""
    for name in (wanted,) if wanted else ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler found ({wanted or 'g++, c++ or clang++'})")


def cpu_files(sources: Path) -> list[Path]:
    """The C++ files of csrc/. What is below cuda/ makes a library of its own (`_build_cuda`)."""
    files = (path for path in sources.rglob("*") if path.suffix in (".cpp", ".h"))
    return sorted(path for path in files if path.relative_to(sources).parts[0] != "cuda")


def source_hash(sources: Path) -> str:
    """Names the library that these sources and flags make. Not of torch's version: the ABI is stable."""
    return hash_of(sources, cpu_files(sources), repr((COMMON, LINK, isas(), platform.machine())))


def hash_of(sources: Path, files: Sequence[Path], facts: str) -> str:
    """Sixteen digits that stand for `files` below `sources`, and for what else a library depends on."""
    digest = hashlib.sha256(facts.encode())
    for path in files:
        digest.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def built_from(library: Path) -> str:
    """The source hash that a library carries, "" for anything else."""
    if not library.stat().st_size:  # nothing to map
        return ""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_MARKER)
        return "" if at < 0 else content[at + len(_MARKER) : at + len(_MARKER) + 16].decode("ascii", "replace")


def compile_commands(sources: Path, torch: Path, cxx: str, chosen: tuple[str, ...]) -> dict[str, list[str]]:
    """Object name -> compiler command, without the output: everything once, csrc/cpu/isa/ once per instruction set."""
    commands = {}
    once = [
        *("-isystem", str(torch / "include"), f'-DOLLAMAPY_SOURCES="{source_hash(sources)}"'),
        f"-DOLLAMAPY_ISAS(X)={' '.join(f'X({isa})' for isa in chosen)}",
    ]
    per_isa = sources / "cpu" / "isa"
    for path in (file for file in cpu_files(sources) if file.suffix == ".cpp"):
        name = path.relative_to(sources).as_posix().replace("/", "_").removesuffix(".cpp")
        if path.parent != per_isa:
            commands[f"{name}.o"] = [cxx, *COMMON, *once, "-c", str(path)]
            continue
        for isa in chosen:
            facts = isas()[isa]
            names = [f"-DOLLAMAPY_ISA={facts.kernels_of or isa}", f"-DOLLAMAPY_TABLE={isa}"]
            if not facts.kernels_of or path.stem == "table":
                commands[f"{name}.{isa}.o"] = [cxx, *COMMON, "-fno-exceptions", *facts.flags, *names, "-c", str(path)]
    return commands


def build(
    target: Path, folder: Path, commands: Mapping[str, Sequence[str]], torch: Path, jobs: int = 0, extra: Sequence[str] = ()
) -> None:
    """Runs `compile_commands` and links into `target`, which appears whole or not at all; objects go to `folder`.

    `extra` flags go to the compiler and the linker. Raises BuildError.
    """
    objects = compile_all(folder, commands, jobs, extra)
    cxx = next(iter(commands.values()))[0]
    link(target, [cxx, *objects, f"-L{torch / 'lib'}", *LINK, *extra])


def compile_all(folder: Path, commands: Mapping[str, Sequence[str]], jobs: int = 0, extra: Sequence[str] = ()) -> list[str]:
    """Runs the commands of `compile_commands`, several at a time: the objects' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        list(pool.map(lambda name: _run([*commands[name], *extra, "-o", str(folder / name)]), commands))
    return [str(folder / name) for name in commands]


def link(target: Path, command: Sequence[str]) -> None:
    """Runs a linker's command, with the output, which replaces `target` once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    _run([*command, "-o", str(partial)])
    os.replace(partial, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise BuildError(f"{command[0]}: {problem}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def cached(cache: Path, sources: Path, torch: Path, cxx: str, isa: str = "") -> Path:
    """The library of these sources for this CPU in `cache`, built now (10 to 20 s on two cores) when it is not there."""
    chosen = isas_for_here(isa)
    folder = cache / f"{source_hash(sources)}-{chosen[0]}"

    def make(compiler: str) -> None:
        build(folder / LIBRARY, folder / "objects", compile_commands(sources, torch, compiler, chosen), torch)

    return built_once(folder / LIBRARY, lambda: find_compiler(cxx), make)


def built_once(library: Path, find: Callable[[], str], make: Callable[[str], None]) -> Path:
    """`library`, which `make` builds with the compiler that `find` finds, when it is not there.

    A file lock keeps processes from building it twice. A failure is remembered for as long as the compiler stays the same:
    every start of an engine would otherwise pay for it again.
    """
    folder, failure = library.parent, library.parent / "failed"
    if library.exists():
        return library
    compiler = find()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        identity = f"{compiler} {os.stat(compiler).st_mtime_ns}\n"
        if failure.exists() and failure.read_text().startswith(identity):
            raise BuildError(f"the compiler failed before; see {failure}, remove it to try again")
        try:
            make(compiler)
        except BuildError as problem:
            failure.write_text(identity + str(problem))
            raise
        finally:
            shutil.rmtree(folder / "objects", ignore_errors=True)
    return library
