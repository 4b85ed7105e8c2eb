"""Loads that a request's own options spoil: others keep the engine that is there, and get one where there is none."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from ollamapy.errors import EngineError, OptionError
from ollamapy.lifecycle import files
from ollamapy.lifecycle.devices import Devices
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.lifecycle.residents import Residents
from tests.lifecycle.fakes import exists, fake_model
from tests.lifecycle.running import GIB, hold, with_residents, within


@pytest.mark.parametrize("options", [{"num_thread": 257}, {"num_batch": 10**6}, {"num_thread": 2**31}])
def test_options_that_no_engine_can_have_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model)
        for _ in range(4):
            with pytest.raises(OptionError, match="at most"):
                await hold(residents, model, options=options)
        assert await hold(residents, model) == pid

    with_residents(check)


def test_options_that_do_not_fit_leave_the_engine_that_is_there(tmp_path: Path) -> None:
    model = fake_model(tmp_path, "one")

    async def check(residents: Residents) -> None:
        pid = await hold(residents, model)
        for _ in range(4):
            with pytest.raises(EngineError, match="requires more system memory"):
                await hold(residents, model, options={"num_batch": 60000})
        assert exists(pid) and await hold(residents, model) == pid

    with_residents(check, discover=lambda: Devices(2, GIB // 3, GIB // 3))


def test_options_that_end_engines_stop_only_those_who_ask_for_them(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    model = fake_model(tmp_path, "one", die_at_load_until=str(broken))

    async def check(residents: Residents) -> None:
        for _ in range(3):
            with pytest.raises(EngineError, match="unexpectedly stopped"):
                await hold(residents, model, options={"num_batch": 7})
        broken.unlink()
        await hold(residents, model)
        with pytest.raises(EngineError, match="3 times within 60 s"):
            await hold(residents, model, options={"num_batch": 7})
        await hold(residents, model)

    with_residents(check)


def test_an_engine_that_dies_while_its_tokenizer_is_built_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_model(tmp_path, "one")
    building, started = threading.Event(), []
    build = files._build_tokenizer

    def slowly(*arguments: Any) -> Any:
        building.wait(10)
        return build(*arguments)

    monkeypatch.setattr(files, "_build_tokenizer", slowly)
    start = EngineProcess.start

    async def noted(*arguments: Any, **more: Any) -> EngineProcess:
        started.append(await start(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(EngineProcess, "start", noted)

    async def check(residents: Residents) -> None:
        asked = asyncio.create_task(hold(residents, model))
        await within(5, lambda: bool(started))
        started[0].kill()
        await started[0].died.wait()
        building.set()
        with pytest.raises(EngineError, match="unexpectedly stopped"):
            await asked
        assert not residents.running()
        await hold(residents, model)

    with_residents(check)
