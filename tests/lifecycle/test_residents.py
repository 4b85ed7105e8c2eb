"""Loading on demand, sharing, reloading for other options, queue limits: real engine processes, fakes inside them."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from ollamapy.api import options as api_options
from ollamapy.errors import ServerBusy
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle.residents import Residents
from tests.lifecycle.fakes import FakeModel, collect, fake_model, llama_keys
from tests.lifecycle.running import hold, loads, with_residents, within
from tests.tokenizer.builders import bpe_metadata


def test_use_loads_and_gives_what_a_request_needs(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.1)

    async def check(residents: Residents) -> None:
        async with residents.use(model, api_options.Options(), None) as loaded:
            assert loaded.model is model
            assert await collect(loaded.engine, 3) == [1, 2, 3]
            assert loaded.tokenizer.decode(loaded.tokenizer.encode("a")) == "a"
            assert loaded.config.embedding_length == 64
            assert loaded.metadata["general.architecture"] == "llama"
            assert "tokenizer.ggml.tokens" not in loaded.metadata
            assert loaded.context_length == 4096
            assert loaded.load_ns >= 100_000_000
        async with residents.use(model, {}) as again:
            assert again.load_ns < 50_000_000
            (row,) = residents.running()
            assert (row.name, row.digest, row.size, row.size_vram) == (model.name, model.digest, 1500, 0)
            assert (row.context_length, row.num_requests) == (4096, 1)
            assert row.resident_bytes > 1 << 20
            assert row.expires_at is not None and 290 < row.expires_at.timestamp() - time.time() <= 300

    with_residents(check)


def test_concurrent_uses_load_once_and_two_names_share_an_engine(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    model = fake_model(tmp_path, "one", load_seconds=0.2, trace=str(trace))
    other = FakeModel(fake_model(tmp_path, "alias").name, "another digest", model.model_path)

    async def check(residents: Residents) -> None:
        pids = await asyncio.gather(*(hold(residents, m, 0.05) for m in [model, other] * 10))
        assert len(set(pids)) == 1
        assert len(loads(trace)) == 1
        async with residents.use(other, {}) as loaded:
            assert loaded.model is other
        drafted = FakeModel(model.name, model.digest, model.model_path, draft_path=model.model_path)
        assert await hold(residents, drafted) not in pids

    with_residents(check)


def test_loaded_models_serve_while_another_loads_and_loads_are_first_come_first_served(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    ready = fake_model(tmp_path, "ready")
    slow = [fake_model(tmp_path, f"slow{i}", load_seconds=0.3, trace=str(trace)) for i in range(2)]

    async def check(residents: Residents) -> None:
        await hold(residents, ready)
        tasks = [asyncio.create_task(hold(residents, model)) for model in slow]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        async with residents.use(ready, {}) as loaded:
            assert await collect(loaded.engine, 3) == [1, 2, 3]
        assert time.monotonic() - start < 0.15
        await within(2, lambda: tasks[0].done())
        assert not tasks[1].done(), "one load at a time"
        await asyncio.gather(*tasks)
        assert [Path(plan["model_path"]).stem for plan in loads(trace)] == ["slow0", "slow1"]

    with_residents(check)


def test_queue_limit_while_loading(tmp_path: Path) -> None:
    model, other = fake_model(tmp_path, "one", load_seconds=0.4), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        tasks = [asyncio.create_task(hold(residents, model)) for _ in range(3)]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        with pytest.raises(ServerBusy) as busy:
            await hold(residents, model)
        assert time.monotonic() - start < 0.1
        assert str(busy.value) == "server busy, please try again.  maximum pending requests exceeded"
        assert busy.value.retry_after >= 1
        await asyncio.gather(*tasks, hold(residents, other))

    with_residents(check, max_queue=2)


def test_queue_limit_of_a_loaded_model(tmp_path: Path) -> None:
    model, other = fake_model(tmp_path, "one"), fake_model(tmp_path, "two")

    async def check(residents: Residents) -> None:
        await hold(residents, model, 0, {"num_batch": 4})
        tasks = [asyncio.create_task(hold(residents, model, 0.4)) for _ in range(6)]
        await asyncio.sleep(0.1)
        with pytest.raises(ServerBusy):  # 4 run, 2 wait
            await hold(residents, model)
        await hold(residents, other)
        await asyncio.gather(*tasks)
        await hold(residents, model)

    with_residents(check, max_queue=2)


def test_a_context_that_the_blocks_hold_needs_no_reload(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model, 0, {"num_ctx": 1024})
        async with residents.use(model, {"num_ctx": 4096}) as loaded:  # there are blocks for eight of 1024
            assert (loaded.engine.pid, loaded.context_length, loaded.max_context) == (pid, 1024, 8192)
        assert await hold(residents, model, 0, {"num_ctx": 8192}) == await hold(residents, model) == pid
        assert await hold(residents, model, 0, {"num_ctx": 1 << 20}) == pid, "capped at the trained 8192"

    with_residents(check)


def test_a_smaller_context_needs_no_reload_and_one_beyond_the_blocks_waits_for_the_running(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    model = fake_model(tmp_path, "one", trace=str(trace))

    async def check(residents: Residents) -> None:
        first = asyncio.create_task(hold(residents, model, 0.4, {"num_ctx": 1024}, keep_alive=-1))
        await within(2, lambda: bool(residents.running()))
        pid = await hold(residents, model, 0, {"num_ctx": 512})
        assert await hold(residents, model) == pid, "no choice: what is loaded will do"
        larger = asyncio.create_task(hold(residents, model, 0.1, {"num_ctx": 2048}))
        await asyncio.sleep(0.05)
        same_again = asyncio.create_task(hold(residents, model, 0, {"num_ctx": 1024}))
        await asyncio.sleep(0.1)
        assert not larger.done() and not same_again.done() and not first.done()
        assert await larger not in (pid, await first)
        assert await same_again == await larger
        assert [plan["context_length"] for plan in loads(trace)] == [1024, 2048]
        assert residents.running()[0].expires_at is None, "a reload keeps the keep_alive"
        await hold(residents, model, 0, {"num_ctx": 1 << 20})  # capped at the trained 8192
        await hold(residents, model, 0, {"num_ctx": 1 << 21})
        assert [plan["context_length"] for plan in loads(trace)] == [1024, 2048, 8192]

    with_residents(check, num_parallel=1)


@pytest.mark.parametrize(
    ("first", "second", "reload"),
    [
        ({}, {"num_thread": 1}, True),
        ({}, {"num_thread": 2}, False),  # what the machine has
        ({"num_thread": 1}, {}, False),
        ({}, {"num_gpu": 0}, False),
        ({}, {"num_gpu": 99}, False),  # there is no GPU
        ({"num_gpu": 0}, {"num_gpu": 99}, True),
        ({}, {"main_gpu": 1, "use_mmap": False, "temperature": 1.0}, False),
        ({}, {"num_batch": 64}, True),
    ],
)
def test_options_that_need_another_engine(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], reload: bool
) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model, options=first)
        assert (await hold(residents, model, options=second) != pid) is reload
        assert len(residents.running()) == 1

    with_residents(check)


def test_waiters_with_different_needs_all_get_what_they_need(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one", load_seconds=0.1)

    async def use(residents: Residents, num_ctx: int) -> int:
        async with residents.use(model, {"num_ctx": num_ctx}) as loaded:
            return loaded.max_context - num_ctx

    async def check(residents: Residents) -> None:
        assert min(await asyncio.gather(*(use(residents, 256 * n) for n in (1, 4, 2, 3, 4, 1)))) >= 0

    with_residents(check, num_parallel=1)


def test_a_reload_does_not_build_the_tokenizer_again_but_a_changed_file_does(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def tokenizer(residents: Residents) -> object:
        async with residents.use(model, {}, 0) as loaded:
            return loaded.tokenizer

    async def check(residents: Residents) -> None:
        first = await tokenizer(residents)
        assert await tokenizer(residents) is first
        assert model.model_path is not None
        os.utime(model.model_path, ns=(1, 1))
        assert await tokenizer(residents) is not first
        for i in range(5):
            await hold(residents, fake_model(tmp_path, f"other{i}"), keep_alive=0)
        assert len(residents._files._files) == 4

    with_residents(check)


def test_a_header_read_before_a_load_is_not_read_again(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        before = await residents.metadata(model)
        async with residents.use(model, {}) as loaded:
            assert loaded.metadata is before

    with_residents(check)


def test_metadata_and_tokenizer_are_in_one_spelling(tmp_path: Path) -> None:
    """A mistral3 file as Ollama writes it: its tokenizer's `pre` is understood, its keys are llama.cpp's."""
    model = fake_model(tmp_path, "one")
    keys = {f"mistral3.{key}": value for key, value in llama_keys().items()}
    vocabulary = bpe_metadata(["a b"], pre="default")
    metadata = {"general.architecture": "mistral3", **keys, "mistral3.rope.scaling.beta_fast": 4.0, **vocabulary}
    assert model.model_path is not None
    write_gguf(model.model_path, metadata, [("token_embd.weight", GGMLType.F32, (257, 64), bytes(4 * 257 * 64))])

    async def check(residents: Residents) -> None:
        async with residents.use(model, {}) as loaded:
            assert loaded.metadata["mistral3.rope.scaling.yarn_beta_fast"] == 4.0
            assert loaded.metadata["tokenizer.ggml.pre"] == "tekken"
            assert loaded.tokenizer.encode("ab") == [256]

    with_residents(check)
