"""What a request answers does not depend on what it runs beside."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.daemon import Daemon

MODEL = "smollm2"
TOPICS = ["sea", "moon", "bread", "clocks", "rain", "maps", "iron", "birds"]
COUNT = 32


def request(n: int) -> dict[str, Any]:
    """Even ones are greedy, odd ones sampled with a seed; prompts of different lengths, half of them with a shared prefix."""
    turns = [{"role": "user", "content": f"Tell me about the {TOPICS[n % 8]}." + " Please." * (n % 5)}]
    if n % 4 < 2:
        turns.insert(0, {"role": "system", "content": "You are a patient teacher who answers in short sentences."})
    options = {"temperature": 0} if n % 2 == 0 else {"temperature": 1.2, "seed": n}
    return {"model": MODEL, "messages": turns, "stream": False, "options": {**options, "num_predict": 6}}


def test_thirty_two_chats_say_what_they_say_alone(daemon: Daemon) -> None:
    def answer(n: int) -> str:
        made = daemon.post("/api/chat", request(n))
        assert made.status_code == 200, made.text
        return str(made.json()["message"]["content"])

    alone = [answer(n) for n in range(COUNT)]
    with ThreadPoolExecutor(COUNT) as pool:
        together = list(pool.map(answer, range(COUNT)))
    assert together == alone
    assert len(set(alone)) > COUNT // 2
    daemon.seconds_until_idle()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_canaries_on_real_kernels(daemon: Daemon) -> None:
    """Each of 250 prompts has a secret of its own; asked 1,000 times, 24 at once, one in four left in the middle."""
    rng, seen = random.Random(9), Counter[str]()
    secrets = [f"{rng.randrange(10**6):06}" for _ in range(250)]
    heads = ["You keep secrets and repeat them when asked. " * 8, "Be brief. ", ""]  # cached by some, not by others

    def asked(number: int, stream: bool) -> dict[str, Any]:
        prompt = f"{heads[number % 3]}The number is {secrets[number]}. Say the number again, then count from it:"
        options = {"temperature": 0, "num_predict": 6 + number % 20}
        return {"model": MODEL, "prompt": prompt, "stream": stream, "options": options}

    def alone(number: int) -> str:
        return str(daemon.post("/api/generate", asked(number, stream=False)).json()["response"])

    def among(plan: tuple[int, float]) -> str:
        number, chance = plan
        if chance >= 0.25:
            made = client.post("/api/generate", json=asked(number, stream=chance < 0.7))
            got = "".join(json.loads(line)["response"] for line in made.text.splitlines())
            assert got == expected[number], number
            return "whole"
        got = ""
        with client.stream("POST", "/api/generate", json=asked(number, stream=True)) as answer:
            for line in answer.iter_lines():
                got += json.loads(line)["response"]
                assert expected[number].startswith(got), number
                if len(got) > 40 * chance:
                    break
        return "left"

    expected = [alone(number) for number in range(len(secrets))]
    assert len(set(expected)) > 200 and sum(secret in text for secret, text in zip(secrets, expected, strict=True)) > 100
    plans = [(number % len(secrets), rng.random()) for number in rng.sample(range(1000), 1000)]
    with httpx.Client(base_url=daemon.url, timeout=120, trust_env=False) as client, ThreadPoolExecutor(24) as pool:
        seen.update(pool.map(among, plans))
    print(seen)
    assert seen["whole"] > 600 and seen["left"] > 150
    daemon.seconds_until_idle()
