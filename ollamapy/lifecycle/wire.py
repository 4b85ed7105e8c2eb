"""Frames over a socketpair: a 4-byte little-endian length and a msgpack body. Knows no messages but the ones it is told."""

from __future__ import annotations

import socket
from typing import Any, Generic, TypeVar

import msgspec

from ollamapy.engine.protocol import MAX_FRAME, Command, Event, Plan

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Daemon to forkserver; one file descriptor travels with it: the engine's end of its socketpair."""

    ticket: int
    plan: Plan


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """Daemon to forkserver: SIGKILL to a child that is still its child, so never to a reused process id."""

    pid: int


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    ticket: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """`code` is the exit code, or minus the signal that ended the process."""

    pid: int
    code: int


class Preloaded(msgspec.Struct, frozen=True, tag="preloaded"):
    """The forkserver has imported what engines need. `num_threads` must be 1, or a fork would not be safe.

    `packed_on`: device kinds whose kernels keep matrices as the file has them; elsewhere they become float32.
    """

    seconds: float
    num_threads: int
    packed_on: tuple[str, ...]


SpawnRequest = Fork | Kill
SpawnReply = Forked | Exited | Preloaded


def encode(message: msgspec.Struct) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    assert len(body) <= MAX_FRAME, f"a {type(message).__name__} of {len(body)} bytes"
    return len(body).to_bytes(4, "little") + body


class FrameReader(Generic[T]):
    """Bytes in any pieces in, whole messages out. Raises msgspec.DecodeError or ValueError on what is no frame."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._pending = bytearray()

    def feed(self, data: bytes | bytearray) -> list[T]:
        self._pending += data
        messages: list[T] = []
        start = 0
        while len(self._pending) - start >= 4:
            length = int.from_bytes(self._pending[start : start + 4], "little")
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes; the most is {MAX_FRAME}")
            if len(self._pending) - start - 4 < length:
                break
            body = bytes(self._pending[start + 4 : start + 4 + length])
            start += 4 + length
            messages.append(self._decoder.decode(body))
        del self._pending[:start]
        return messages


def commands() -> FrameReader[Command]:
    return FrameReader(Command)


def events() -> FrameReader[Event]:
    return FrameReader(Event)


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a stream; neither is inherited by an exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
