"""Malformed files, one kind each: every one is a GGUFError that names the file, the field and an offset inside it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from ollamapy.errors import GGUFError
from ollamapy.gguf.reader import GGUFFile
from tests.gguf.bytes import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    File,
    array,
    key,
    tensor,
    text,
)

HUGE = (1 << 64) - 1
FLOATS = bytes(4096)


def deep(levels: int) -> bytes:
    """An array of an array of ... of no element."""
    payload = array(U8, 0)
    for _ in range(levels - 1):
        payload = array(ARRAY, 1, payload)
    return payload


def with_key(name: str, kind: int, payload: bytes) -> File:
    return File(keys=[ARCHITECTURE, key(name, kind, payload)])


def alignment(value: int, kind: int = U32) -> File:
    return with_key("general.alignment", kind, struct.pack("<I" if kind != U64 else "<Q", value))


# kind -> (file, field that the error names, words of the problem)
CORPUS: dict[str, tuple[File | bytes, str, str]] = {
    "empty file": (b"", "magic", "empty"),
    "three bytes": (b"GGU", "magic", "3 left"),
    "wrong magic": (File(magic=b"GGML"), "magic", "not a GGUF file"),
    "safetensors": (struct.pack("<Q", 8) + b'{"a":{}}', "magic", "not a GGUF file"),
    "zip": (b"PK\3\4" + bytes(60), "magic", "not a GGUF file"),
    "no version": (b"GGUF\3\0", "version", "2 left"),
    "version 0": (File(version=struct.pack("<I", 0)), "version", "0 is not supported"),
    "version 1": (File(version=struct.pack("<I", 1)), "version", "1 is not supported"),
    "version 4": (File(version=struct.pack("<I", 4)), "version", "4 is not supported"),
    "version 2^32-1": (File(version=b"\xff" * 4), "version", "not supported"),
    "big endian": (File(version=struct.pack(">I", 3)), "version", "big-endian"),
    "no counts": (b"GGUF\3\0\0\0", "tensor count", "0 left"),
    "half a count": (b"GGUF\3\0\0\0" + bytes(12), "key count", "4 left"),
    "tensor count 2^64-1": (File(num_tensors=HUGE), "tensor count", "more than"),
    "tensor count 2^63": (File(num_tensors=1 << 63), "tensor count", "more than"),
    "tensor count beyond the file": (File(num_tensors=200), "tensor count", "more than"),
    "tensor count one too many": (File(num_tensors=2, data=bytes(60)), "tensor 1", "empty name"),
    "key count 2^64-1": (File(num_keys=HUGE), "key count", "more than"),
    "key count beyond the file": (File(num_keys=100), "key count", "more than"),
    "key count above the limit": (File(num_keys=1 << 17, data=bytes(1 << 21)), "key count", "limit"),
    "key count one too many": (File(num_keys=2, tensors=[], data=bytes(60)), "key 1", "empty key"),
    "key length 2^63": (File(keys=[text(b"a", 1 << 63) + bytes(40)]), "key 0", "string of 9223372036854775808 bytes"),
    "key length 2^64-1": (File(keys=[text(b"a", HUGE) + bytes(40)]), "key 0", "string of"),
    "key longer than 65535 bytes": (File(keys=[key("k" * 70000, U8, b"\0")]), "key 0", "limit is 65535"),
    "empty key": (File(keys=[key("", U8, b"\0")]), "key 0", "empty key"),
    "key not UTF-8": (File(keys=[key(b"a\xff\xfe", U8, b"\0")]), "key 0", "not UTF-8"),
    "key with a surrogate": (File(keys=[key(b"\xed\xa0\x80", U8, b"\0")]), "key 0", "not UTF-8"),
    "duplicate key": (File(keys=[ARCHITECTURE, ARCHITECTURE]), "general.architecture", "duplicate"),
    "value type 13": (with_key("x", 13, bytes(8)), "x", "unknown metadata type 13"),
    "value type 2^32-1": (with_key("x", 0xFFFFFFFF, bytes(8)), "x", "unknown metadata type"),
    "boolean 2": (with_key("x", BOOL, b"\2"), "x", "2 is not a boolean"),
    "string value length 2^63": (with_key("x", STRING, text("", 1 << 63)), "x", "string of"),
    "string value past the end": (with_key("x", STRING, text("abc", 4000)), "x", "string of 4000 bytes"),
    "string value not UTF-8": (with_key("x", STRING, text(b"\x80")), "x", "not UTF-8"),
    "value cut off": (bytes(File(keys=[key("x", U64, b"")], tensors=[], data=b""))[:44].rstrip(b"\0") + b"\0" * 4, "x", "left"),
    "array type unknown": (with_key("x", ARRAY, array(99, 1, bytes(8))), "x", "unknown metadata type 99"),
    "array count 2^64-1": (with_key("x", ARRAY, array(U8, HUGE)), "x", "more than"),
    "array count 2^61, of 8 bytes": (with_key("x", ARRAY, array(U64, 1 << 61)), "x", "more than"),
    "array past the end": (with_key("x", ARRAY, array(F32, 1000, bytes(100))), "x", "more than"),
    "string array count past the end": (with_key("x", ARRAY, array(STRING, 1 << 20, bytes(800))), "x", "more than"),
    "string array element 2^63": (
        with_key("x", ARRAY, array(STRING, 2, text("ok") + text("", 1 << 63))), "x[1]", "past the end"),
    "string array element 2^64-1": (
        with_key("x", ARRAY, array(STRING, 3, text("", HUGE) + bytes(64))), "x[0]", "past the end"),
    "string array last element too long": (
        with_key("x", ARRAY, array(STRING, 2, text("ok") + text("abc", 5000))), "x[1]", "past the end"),
    "string array first element swallows the rest": (
        with_key("x", ARRAY, array(STRING, 3, text("abc", 150) + bytes(30))), "x[", "past the end"),
    "nested arrays 5 deep": (with_key("x", ARRAY, deep(5)), "x", "nested deeper"),
    "nested arrays 100,000 deep": (with_key("x", ARRAY, deep(100_000)), "x", "nested deeper"),
    "nested array count 2^60": (with_key("x", ARRAY, array(ARRAY, 1 << 60)), "x", "more than"),
    "inner array past the end": (
        with_key("x", ARRAY, array(ARRAY, 2, array(U8, 1, b"\1") + array(I32, 1 << 40))), "x", "more than"),
    "alignment 0": (alignment(0), "general.alignment", "power of two"),
    "alignment 3": (alignment(3), "general.alignment", "power of two"),
    "alignment 2^32-1": (alignment(0xFFFFFFFF), "general.alignment", "power of two"),
    "alignment -32": (alignment(0xFFFFFFE0, I32), "general.alignment", "power of two"),
    "alignment of the wrong type": (alignment(32, U64), "general.alignment", "power of two"),
    "alignment a string": (with_key("general.alignment", STRING, text("32")), "general.alignment", "power of two"),
    "alignment 2^31 moves the data out": (alignment(1 << 31), "t", "data ends at byte"),
    "tensor name length 2^63": (File(tensors=[text("t", 1 << 63) + bytes(40)]), "tensor 0", "string of"),
    "tensor name empty": (File(tensors=[tensor("")]), "tensor 0", "empty name"),
    "tensor name not UTF-8": (File(tensors=[tensor(b"\xc0\x80")]), "tensor 0", "not UTF-8"),
    "tensor name too long": (File(tensors=[tensor("n" * 70000)]), "tensor 0", "limit"),
    "duplicate tensor": (File(tensors=[tensor(), tensor(offset=32)], data=FLOATS), "t", "duplicate"),
    "5 dimensions": (File(tensors=[tensor(shape=(1,) * 5)]), "t", "5 dimensions"),
    "2^32-1 dimensions": (File(tensors=[tensor(dims=0xFFFFFFFF)]), "t", "dimensions"),
    "dimension 0": (File(tensors=[tensor(shape=(0,))]), "t", "dimension 0"),
    "dimension 0 behind others": (File(tensors=[tensor(shape=(4, 0, 4))]), "t", "dimension 0"),
    "dimension 2^63": (File(tensors=[tensor(shape=(1 << 63,))]), "t", "2^63 elements"),
    "dimension 2^64-1": (File(tensors=[tensor(shape=(HUGE,))]), "t", "2^63 elements"),
    "product wraps to 0": (File(tensors=[tensor(shape=(1 << 32, 1 << 32))]), "t", "2^63 elements"),
    "product wraps to a small number": (File(tensors=[tensor(shape=((1 << 32) + 1, (1 << 32) - 1, 3, 1))]), "t", "2^63"),
    "bytes wrap, elements do not": (File(tensors=[tensor(shape=(1 << 62,))]), "t", "data ends at byte"),
    "half a block": (File(tensors=[tensor(shape=(33, 2), kind=2)]), "t", "whole Q4_0 blocks"),
    "block type on a short row": (File(tensors=[tensor(shape=(32, 8), kind=12)]), "t", "whole Q4_K blocks"),
    "tensor type 4, withdrawn": (File(tensors=[tensor(kind=4)]), "t", "Q4_2 no longer exists"),
    "tensor type 31, withdrawn": (File(tensors=[tensor(kind=31)]), "t", "Q4_0_4_4 no longer exists"),
    "tensor type 43": (File(tensors=[tensor(kind=43)]), "t", "unknown tensor type 43"),
    "tensor type 2^32-1": (File(tensors=[tensor(kind=0xFFFFFFFF)]), "t", "unknown tensor type"),
    "offset not aligned": (File(tensors=[tensor(offset=16)], data=FLOATS), "t", "multiple of the alignment"),
    "offset 2^64-32": (File(tensors=[tensor(offset=HUGE - 31)]), "t", "data ends at byte"),
    "offset behind the end": (File(tensors=[tensor(offset=1 << 20)]), "t", "data ends at byte"),
    "data one byte short": (File(data=bytes(15)), "t", "data ends at byte"),
    "no data at all": (File(data=b""), "t", "data ends at byte"),
    "same offset twice": (File(tensors=[tensor("a"), tensor("b")], data=FLOATS), "b", "overlaps that of a"),
    "overlap by a block": (
        File(tensors=[tensor("a", (16,)), tensor("b", (4,), offset=32)], data=FLOATS), "b", "overlaps that of a"),
    "one inside the other, out of order": (
        File(tensors=[tensor("b", (4,), offset=64), tensor("a", (100,))], data=FLOATS), "b", "overlaps that of a"),
    "split count is text": (with_key("split.count", STRING, text("2")), "split.count", "not a number"),
    "split count 60000": (with_key("split.count", U16, struct.pack("<H", 60000)), "split.count", "not a number"),
    "split without its name": (with_key("split.count", U16, b"\2\0"), "split.count", "must end in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CORPUS)
def test_is_refused(kind: str, tmp_path: Path) -> None:
    content, field, words = CORPUS[kind]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(bytes(content))
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(path)
    error = caught.value
    assert error.field.startswith(field), error
    assert words in error.problem, error
    assert error.path == str(path) and str(path) in str(error) and error.status == 400


def test_the_corpus_is_large_and_its_template_valid(tmp_path: Path) -> None:
    assert len(CORPUS) >= 40
    path = tmp_path / "good.gguf"
    path.write_bytes(bytes(File()))
    with GGUFFile.open(path) as file:
        assert file.tensors["t"].nbytes == 16 and dict(file.metadata) == {"general.architecture": "llama"}


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = bytes(
        File(
            keys=[ARCHITECTURE, key("a", ARRAY, array(STRING, 2, text("x") + text("yz"))), key("b", U64, bytes(8))],
            tensors=[tensor("one"), tensor("two", (2, 2), offset=32)],
            data=bytes(48),
        )
    )
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError) as caught:
            GGUFFile.open(path)
        assert 0 <= caught.value.offset <= max(length, len(whole)), length
    path.write_bytes(whole)
    assert GGUFFile.open(path).tensors.keys() == {"one", "two"}


def test_wrong_elements_of_arrays_are_found_when_decoded(tmp_path: Path) -> None:
    path = tmp_path / "late.gguf"
    content = File(
        keys=[
            key("words", ARRAY, array(STRING, 2, text("fine") + text(b"\xff"))),
            key("flags", ARRAY, array(BOOL, 3, b"\0\1\2")),
        ],
        tensors=[],
    )
    path.write_bytes(bytes(content))
    file = GGUFFile.open(path)
    with pytest.raises(GGUFError, match="not UTF-8") as caught:
        file.metadata["words"]
    assert caught.value.field == "words[1]"
    with pytest.raises(GGUFError, match="booleans"):
        file.metadata["flags"]


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_only_regular_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    with pytest.raises(GGUFError, match="not a regular file"):
        GGUFFile.open(path)


def test_a_missing_file_is_the_callers_affair(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(tmp_path / "none.gguf")


def test_millions_of_strings_are_refused_before_they_are_walked(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    count = (1 << 23) + 1
    head = bytes(with_key("x", ARRAY, array(STRING, count)))
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + 8 * count)
    with pytest.raises(GGUFError, match="more than 8388608 strings"):
        GGUFFile.open(path)
