"""What the choices of one prompt share is made once."""

from __future__ import annotations

import asyncio

import pytest

from ollamapy.errors import BadRequest
from ollamapy.server.choices import MAX_CHOICES, MAX_N, Once, check_choices


def test_it_is_made_by_the_first_that_stays() -> None:
    made: list[str] = []

    async def main() -> None:
        once: Once[str] = Once()

        async def make(name: str) -> str:
            made.append(name)
            await asyncio.sleep(0.05)
            return name

        first = asyncio.create_task(once.get(1, lambda: make("gone")))
        others = [asyncio.create_task(once.get(1, lambda n=n: make(f"of {n}"))) for n in range(5)]  # type: ignore[misc]
        await asyncio.sleep(0.01)
        first.cancel()
        assert await asyncio.gather(*others) == ["of 0"] * 5 and made == ["gone", "of 0"]
        assert await once.get(2, lambda: make("another")) == "another"

    asyncio.run(main())


@pytest.mark.parametrize(("prompts", "n", "text"), [
    (1, 0, "n must be between"), (1, MAX_N + 1, "n must be between"), (MAX_CHOICES // 2 + 1, 2, "are more than"),
])  # fmt: skip
def test_too_many(prompts: int, n: int, text: str) -> None:
    check_choices(1, MAX_N)
    with pytest.raises(BadRequest, match=text):
        check_choices(prompts, n)
