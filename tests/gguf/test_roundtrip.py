"""Writer to reader and back, with gguf-py on either side; split files; the two real models' headers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ollamapy.errors import GGUFError
from ollamapy.gguf.reader import GGUFFile, is_gguf
from ollamapy.gguf.types import TYPES, GGMLType, GGUFValue, ValueType, tensor_nbytes
from ollamapy.gguf.writer import TensorSource, infer_type, write_gguf, write_split

LIMITS: dict[ValueType, tuple[Any, Any]] = {
    ValueType.UINT8: (0, 2**8 - 1),
    ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1),
    ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1),
    ValueType.INT64: (-(2**63), 2**63 - 1),
    ValueType.FLOAT32: (-0.5, 3.0e38),
    ValueType.FLOAT64: (1e-300, 1.7e308),
    ValueType.BOOL: (False, True),
    ValueType.STRING: ("", "naïve 😀 \0 text"),
}


def every_value() -> dict[str, GGUFValue]:
    values = {"general.architecture": GGUFValue(ValueType.STRING, "llama")}
    for kind, pair in LIMITS.items():
        for index, value in enumerate(pair):
            values[f"scalar.{kind.name}.{index}"] = GGUFValue(kind, value)
        values[f"array.{kind.name}"] = GGUFValue(kind, [*pair, pair[0]])
        values[f"empty.{kind.name}"] = GGUFValue(kind, [])
        values[f"nested.{kind.name}"] = GGUFValue(kind, [[pair[0]], list(pair)])
    values["deep"] = GGUFValue(ValueType.INT8, [[[[1, -2]], [[3]]]])
    return values


def every_tensor(seed: int = 3) -> list[TensorSource]:
    rng = np.random.default_rng(seed)
    sources: list[TensorSource] = []
    for kind, info in TYPES.items():
        for shape in ((info.block_size,), (3, 2 * info.block_size), (2, 1, 3, info.block_size)):
            nbytes = tensor_nbytes(kind, shape)
            sources.append((f"{kind.name}.{len(shape)}", kind, shape, rng.bytes(nbytes)))
    return sources


def assert_same(file: GGUFFile, metadata: dict[str, GGUFValue], tensors: list[TensorSource]) -> None:
    assert list(file.metadata) == list(metadata)
    for key, expected in metadata.items():
        value = file.metadata[key]
        if expected.type is ValueType.FLOAT32:
            assert np.array_equal(np.float32(value), np.float32(expected.value)) if not isinstance(value, list) else True
        else:
            assert value == expected.value and type(value) is type(expected.value), key
    assert list(file.tensors) == [name for name, *_ in tensors]
    for name, kind, shape, data in tensors:
        info = file.tensors[name]
        assert (info.type, info.shape, info.nbytes) == (kind, tuple(shape), len(data)), name  # type: ignore[arg-type]
        assert bytes(file.data(name)) == data and file.data(name).readonly


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 1, 8, 32, 4096])
def test_every_value_and_tensor_type(version: int, alignment: int | None, tmp_path: Path) -> None:
    metadata, tensors = every_value(), every_tensor()
    if alignment is not None:
        metadata["general.alignment"] = GGUFValue(ValueType.UINT32, alignment)
    path = tmp_path / "all.gguf"
    write_gguf(path, metadata, tensors, version=version)
    with GGUFFile.open(path) as file:
        assert file.version == version and file.alignment == (alignment or 32) and is_gguf(path)
        assert_same(file, metadata, tensors)
        assert all(info.offset % file.alignment == 0 for info in file.tensors.values())
        again = tmp_path / "again.gguf"
        typed = {key: file.metadata.typed(key) for key in file.metadata}
        write_gguf(again, typed, [(n, i.type, i.shape, file.data(n)) for n, i in file.tensors.items()], version=version)
    assert again.read_bytes() == path.read_bytes()


def test_default_types() -> None:
    kinds = [
        (True, ValueType.BOOL),
        (7, ValueType.UINT32),
        (-7, ValueType.INT32),
        (1 << 32, ValueType.UINT64),
        (-(1 << 40), ValueType.INT64),
        (0.5, ValueType.FLOAT32),
        ("x", ValueType.STRING),
        ([1, 2], ValueType.INT32),
        ([-1, 2], ValueType.INT32),
        ([1 << 31], ValueType.UINT32),
        ([1, 1 << 40], ValueType.UINT64),
        ([0.5], ValueType.FLOAT32),
        ([["a"], []], ValueType.STRING),
        ([True, False], ValueType.BOOL),
    ]
    for value, kind in kinds:
        assert infer_type(value) == GGUFValue(kind, value), value
    for value in ([], [1, "a"], [1, 2.0], [True, 1], None, {}, b"x", 1 << 64, [-1, 1 << 63]):
        with pytest.raises(ValueError):
            infer_type(value)


def test_gguf_py_reads_ours(tmp_path: Path) -> None:
    metadata = {key: value for key, value in every_value().items() if not key.startswith(("nested", "empty", "deep"))}
    tensors = [source for source in every_tensor() if source[1] not in (GGMLType.Q2_0, GGMLType.Q8_1)]
    path = tmp_path / "ours.gguf"
    write_gguf(path, metadata, tensors)
    theirs = gguf.GGUFReader(path)
    for key, expected in metadata.items():
        value = theirs.fields[key].contents()
        if expected.type is ValueType.FLOAT32:
            assert np.array_equal(np.float32(value), np.float32(expected.value)), key
        else:
            assert value == expected.value, key
    found = {tensor.name: tensor for tensor in theirs.tensors}
    for name, kind, shape, data in tensors:
        assert found[name].tensor_type == int(kind)
        assert [int(size) for size in reversed(found[name].shape)] == list(shape)
        assert found[name].data.tobytes() == data, name


def test_ours_reads_gguf_py(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 1e200)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße")
    writer.add_array("words", ["a", "", "ccc"])
    writer.add_array("numbers", [3, -1])
    writer.add_array("floats", [0.5, 2.0])
    matrix = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer.add_tensor("matrix", matrix)
    writer.add_tensor("half", matrix[0].astype(np.float16))
    quantized = gguf.quants.quantize(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert dict(file.metadata) == {
            "general.architecture": "llama",
            "u8": 200,
            "i8": -100,
            "u16": 60000,
            "i16": -30000,
            "u32": 4_000_000_000,
            "i32": -2_000_000_000,
            "u64": 1 << 63,
            "i64": -(1 << 62),
            "f32": 0.25,
            "f64": 1e200,
            "yes": True,
            "text": "grüße",
            "words": ["a", "", "ccc"],
            "numbers": [3, -1],
            "floats": [0.5, 2.0],
        }
        assert file.tensors["matrix"].shape == (2, 3, 4) and bytes(file.data("matrix")) == matrix.tobytes()
        assert file.tensors["half"].type is GGMLType.F16
        info = file.tensors["quantized"]
        assert info.type is GGMLType.Q8_0 and info.shape == (2, 64) and bytes(file.data("quantized")) == quantized.tobytes()


def test_lazy_data_comes_one_tensor_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def maker(name: str) -> Any:
        def make() -> bytes:
            made.append(name)
            return name.encode() * 16

        return make

    path = tmp_path / "lazy.gguf"
    write_gguf(path, {}, [(name, GGMLType.F32, (4,), maker(name)) for name in "ab"])
    assert made == ["a", "b"] and bytes(GGUFFile.open(path).data("b")) == b"b" * 16


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")

    def broken() -> bytes:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_gguf(path, {}, [("t", GGMLType.F32, (4,), broken)])
    with pytest.raises(ValueError, match="15 bytes given"):
        write_gguf(path, {}, [("t", GGMLType.F32, (4,), bytes(15))])
    for metadata in ({"general.alignment": 3}, {"x": GGUFValue(ValueType.UINT8, 256)}, {"x": []}):
        with pytest.raises(ValueError):
            write_gguf(path, metadata, [])
    for shape in ((0,), (1, 1, 1, 1, 1), (-4,)):
        with pytest.raises(ValueError, match="does not fit"):
            write_gguf(path, {}, [("t", GGMLType.F32, shape, b"")])
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.gguf"]


def split_parts() -> list[list[TensorSource]]:
    sources = every_tensor()
    return [sources[:10], sources[10:11], sources[11:]]


def test_split_files_are_joined(tmp_path: Path) -> None:
    metadata = {**every_value(), "general.alignment": GGUFValue(ValueType.UINT32, 64)}
    first = write_split(tmp_path, "model", metadata, split_parts())
    assert first.name == "model-00001-of-00003.gguf"
    with GGUFFile.open(first) as file:
        assert [info.part for info in file.tensors.values()] == [0] * 10 + [1] + [2] * (len(every_tensor()) - 11)
        for name, _, _, data in every_tensor():
            assert bytes(file.data(name)) == data
        assert file.metadata["split.count"] == 3 and len(file.part_paths) == 3


def test_parts_under_other_names_are_given_explicitly(tmp_path: Path) -> None:
    first = write_split(tmp_path, "m", {}, split_parts())
    blobs = []
    for index, part in enumerate(sorted(tmp_path.iterdir())):
        blobs.append(part.rename(tmp_path / f"sha256-{index}"))
    assert not first.exists()
    with GGUFFile.open(*blobs) as file:
        assert len(file.tensors) == len(every_tensor())
    with pytest.raises(GGUFError, match="must end in"):
        GGUFFile.open(blobs[0])
    with pytest.raises(GGUFError, match="3 parts expected, 2 given"):
        GGUFFile.open(*blobs[:2])
    with pytest.raises(GGUFError, match="2 in the place of part 1"):
        GGUFFile.open(blobs[0], blobs[2], blobs[1])


def test_incomplete_and_mixed_splits(tmp_path: Path) -> None:
    first = write_split(tmp_path, "m", {}, split_parts())
    second, third = (tmp_path / f"m-0000{number}-of-00003.gguf" for number in (2, 3))
    with pytest.raises(GGUFError, match="this is part 2 of 3; open part 1"):
        GGUFFile.open(second)
    saved = second.read_bytes()
    second.unlink()
    with pytest.raises(GGUFError, match=r"part 2 of 3 is missing: m-00002-of-00003\.gguf"):
        GGUFFile.open(first)
    second.write_bytes(saved[:-200])
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(first)
    assert caught.value.path == str(second)
    second.write_bytes(saved)
    keys = {"split.no": 1, "split.count": 3}
    write_gguf(second, keys, [("F32.1", GGMLType.F32, (1,), bytes(4))])
    with pytest.raises(GGUFError, match="already in another part"):
        GGUFFile.open(first)
    write_gguf(second, {**keys, "split.count": 2}, [])
    with pytest.raises(GGUFError, match="differs from the first part's 3"):
        GGUFFile.open(first)
    write_gguf(second, keys, [])
    with pytest.raises(GGUFError, match=r"split\.tensors\.count.*expected"):
        GGUFFile.open(first)
    assert third.exists()


def test_smollm2_header(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        metadata = file.metadata
        assert file.version == 3 and len(file.tensors) == 272
        assert metadata["general.architecture"] == "llama" and metadata["general.file_type"] == 3
        assert (metadata["llama.block_count"], metadata["llama.embedding_length"]) == (30, 576)
        assert metadata.array_length("tokenizer.ggml.tokens") == len(metadata["tokenizer.ggml.tokens"]) == 49152
        assert len(metadata["tokenizer.ggml.merges"]) == 48900 and metadata["tokenizer.ggml.merges"][0] == "Ġ t"
        assert file.tensors["token_embd.weight"].shape == (49152, 576)
        assert file.tensors["blk.29.ffn_down.weight"].type is GGMLType.Q4_1


def test_gemma3_header(gemma3_path: Path) -> None:
    with GGUFFile.open(gemma3_path) as file:
        metadata = file.metadata
        assert metadata["general.architecture"] == "gemma3" and len(file.tensors) == 236
        tokens = metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == 262144 and tokens[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"] and tokens[106] == "<end_of_turn>"
        assert len(metadata["tokenizer.ggml.scores"]) == len(metadata["tokenizer.ggml.token_type"]) == 262144
        types = {info.type.name for info in file.tensors.values()}
        assert types == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}
        assert file.tensors["token_embd.weight"].shape == (262144, 640)


def test_data_of_a_real_file_lies_where_gguf_py_finds_it(smollm2_path: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    with GGUFFile.open(smollm2_path) as file:
        assert theirs.keys() == file.tensors.keys()
        for name, info in file.tensors.items():
            assert info.offset == theirs[name].data_offset and info.nbytes == theirs[name].n_bytes
            assert file.data(name)[:64] == theirs[name].data.reshape(-1).view(np.uint8)[:64].tobytes()


def best_of(count: int, action: Any) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def test_opening_a_large_vocabulary_is_quick(gemma3_path: Path) -> None:
    """Measured: 21 ms to open, 90 ms to decode 262,144 strings."""
    assert best_of(5, lambda: GGUFFile.open(gemma3_path)) < 0.150
    assert best_of(3, lambda: GGUFFile.open(gemma3_path).metadata["tokenizer.ggml.tokens"]) < 0.450


def test_reading_imports_neither_torch_nor_numpy(smollm2_path: Path) -> None:
    code = (
        "import sys; from ollamapy.gguf.reader import GGUFFile; import ollamapy.gguf.writer, ollamapy.gguf.dialect;"
        f"GGUFFile.open({str(smollm2_path)!r}).metadata['tokenizer.ggml.merges'];"
        "print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == ""


def test_scalar_tensor(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    write_gguf(path, {}, [("scale", GGMLType.F32, (), struct.pack("<f", 1.5))])
    with GGUFFile.open(path) as file:
        assert file.tensors["scale"].shape == () and struct.unpack("<f", file.data("scale")) == (1.5,)
