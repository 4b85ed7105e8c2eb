"""What a request answers does not depend on what it runs beside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
