"""What users of a server ask for, as lists of chats: deterministic, the same for every server. Sends nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = (
    "the river lake stone wind bird house road night morning water light old small green long quiet river bridge "
    "boat field farmer market bread letter clock garden winter summer story child mother hand door window paper "
    "table train city street walk sing carry open close find keep tell ask make turn bring hold stand under over "
    "near between after before while and but with from into about because then again always never often"
)
TOPICS = (
    "the sea, a small village, the invention of paper, a lighthouse keeper, how bread is made, the moon, a lost "
    "dog, the first train, a garden in winter, how rivers form, an old clock, the desert at night, a busy market, "
    "learning to swim, a letter from far away, the colour blue"
)
ASK = "Write a long story about {}. Tell it slowly, with many details, and do not stop early. This is version {}."
TOKENS = 64  # of each answer at most
SYSTEM_WORDS = 800  # about 1,000 tokens
LONG_WORDS = 1100  # about 1,400 tokens
LONG_EVERY = 4  # of the mixed workload, one chat in so many has a long prompt


@dataclass(frozen=True, slots=True)
class Chat:
    """One request: its messages, and how many tokens it wants at most."""

    text: str
    system: str = ""
    tokens: int = TOKENS

    @property
    def messages(self) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": self.text}]
        return [{"role": "system", "content": self.system}, *asked] if self.system else asked


def question(number: int) -> str:
    """Different from others within its first sentence, so that no server can answer two from one computation."""
    topics = TOPICS.split(", ")
    return ASK.format(topics[number % len(topics)], number)


def prose(words: int, seed: int) -> str:
    """`words` words in sentences of twelve; 1.2 to 1.3 tokens a word in the vocabularies measured."""
    chosen = random.Random(seed).choices(WORDS.split(" "), k=words)
    return " ".join(" ".join(chosen[at : at + 12]).capitalize() + "." for at in range(0, words, 12))


def short(count: int, seed: int) -> list[Chat]:
    """Questions of 40 tokens with answers of 64."""
    return [Chat(question(seed * 1000 + number)) for number in range(count)]


def shared(count: int, seed: int) -> list[Chat]:
    """A system prompt of about 1,000 tokens that all have, and a question each."""
    return [Chat(question(seed * 1000 + number), prose(SYSTEM_WORDS, seed)) for number in range(count)]


def separate(count: int, seed: int) -> list[Chat]:
    """The same sizes as `shared`, but no two system prompts begin alike: what a prefix cache cannot help."""
    return [Chat(question(seed * 1000 + number), prose(SYSTEM_WORDS, seed * 1000 + number)) for number in range(count)]


def mixed(count: int, seed: int) -> list[Chat]:
    """One long prompt to be answered briefly for every three short chats."""
    chats = []
    for number, chat in enumerate(short(count, seed)):
        long = "Summarize this in one sentence.\n" + prose(LONG_WORDS, seed * 1000 + number)
        chats.append(Chat(long, tokens=TOKENS // 4) if number % LONG_EVERY == 0 else chat)
    return chats


WORKLOADS: dict[str, Callable[[int, int], Sequence[Chat]]] = {
    "short": short,
    "shared": shared,
    "separate": separate,
    "mixed": mixed,
}
"""Name -> (count, seed) -> chats. Another seed gives chats that share nothing with those before."""
