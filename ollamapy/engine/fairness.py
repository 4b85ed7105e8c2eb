"""Who is next: the sequences that wait, and what each client has been served. Knows no blocks and no tensors.

Between clients the fair share is that of virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language
Models"): each computed token is charged to its client, and the client with the lowest counter goes first. One who comes after
a pause starts at the lowest counter of those who are there, so idleness saves nothing up. Requests of tier "flex" go behind
all others until they have waited AGED; "priority" only goes before other requests of the same client.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from heapq import heapify, heappop, heapreplace

from ollamapy.engine.sequence import Sequence

PROMPT_COST, TOKEN_COST = 1, 2  # a generated token takes a pass of its own; weights of the paper
PASSING = 8  # one prompt passes another when its client was served fewer tokens meanwhile than so many times what it is shorter
AGED = 60 * 10**9  # ns after which a flex request counts as any other
MAX_IDLE = 1024  # clients without a request whose counters are kept
_RANK = {"priority": 0, "default": 1, "flex": 2}


def lane(seq: Sequence, now: int) -> int:
    """1 for a request that goes behind others, else 0; `now` as `seq.arrival_ns`."""
    return int(seq.caller.tier == "flex" and now - seq.arrival_ns < AGED)


def age(seq: Sequence) -> tuple[int, int]:
    """Sorts the oldest first; no two are equal."""
    return seq.arrival_ns, seq.request_id


class Shares:
    """Virtual token counters by client, and how many requests of each are there."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._requests: Counter[str] = Counter()
        self._idle: OrderedDict[str, int] = OrderedDict()  # counters of clients that have left, the last one at the end

    def __len__(self) -> int:
        return len(self._served)

    def served(self, seq: Sequence) -> int:
        return self._served[seq.caller.client]

    def arrive(self, client: str) -> None:
        if not self._requests[client]:
            lowest = min(self._served.values()) if self._served else next(reversed(self._idle.values()), 0)
            self._served[client] = max(self._idle.pop(client, 0), lowest)
        self._requests[client] += 1

    def charge(self, seq: Sequence, cost: int) -> None:
        self._served[seq.caller.client] += cost

    def leave(self, client: str) -> None:
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]
            self._idle[client] = self._served.pop(client)
            if len(self._idle) > MAX_IDLE:
                self._idle.popitem(last=False)


def in_turn(prompts: ListLike[Sequence], shares: Shares, now: int) -> list[Sequence]:
    """Running prompts in the order in which a step is to take them: those of clients by where their counters would stand at the
    end of their first (a finish tag of fair queueing, Demers et al. 1989).

    That does not move while a prompt is computed, so one that has begun is not put off for its equals: side by side, the first
    tokens of all would come at the end. Of one client, urgent ones come first, then shorter ones that came no later than
    PASSING says: those of about one length go in order of arrival, and a long one is not passed for ever.
    """
    by_client: dict[str, list[Sequence]] = {}
    for seq in sorted(prompts, key=lambda seq: _turn(seq, now), reverse=True):
        by_client.setdefault(seq.caller.client, []).append(seq)  # the first one last
    served = {client: shares.served(mine[0]) for client, mine in by_client.items()}

    def tag(client: str) -> tuple[int, int, tuple[int, int], str]:
        first = by_client[client][-1]
        served[client] += PROMPT_COST * first.num_uncomputed
        return lane(first, now), served[client], age(first), client

    tags = [tag(client) for client in by_client]
    heapify(tags)
    order = []
    while tags:
        client = tags[0][-1]
        order.append(by_client[client].pop())
        if by_client[client]:
            heapreplace(tags, tag(client))
        else:
            heappop(tags)
    return order


def _turn(seq: Sequence, now: int) -> tuple[int, bool, int, tuple[int, int]]:
    return lane(seq, now), seq.caller.tier != "priority", seq.start + PASSING * PROMPT_COST * seq.num_uncomputed, age(seq)


class Queue:
    """Waiting sequences by client and tier, each in order of arrival."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._by_client: dict[str, list[Sequence]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for sequences in self._by_client.values() for seq in sequences)

    def add(self, seq: Sequence) -> None:
        """To its place: one that was preempted is older than those that came after it."""
        mine = self._by_client.setdefault(seq.caller.client, [])
        at = len(mine)
        while at and _place(mine[at - 1]) > _place(seq):
            at -= 1
        mine.insert(at, seq)
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        mine = self._by_client[seq.caller.client]
        mine.remove(seq)
        self._length -= 1
        if not mine:
            del self._by_client[seq.caller.client]

    def next(self, now: int) -> Sequence:
        """The one to be admitted next; there is one."""
        heads = [self._head(sequences, now) for sequences in self._by_client.values()]
        return min(heads, key=lambda seq: (lane(seq, now), self._shares.served(seq), age(seq)))

    @staticmethod
    def _head(mine: list[Sequence], now: int) -> Sequence:
        """A client's first; its oldest flex request before all others once it has aged."""
        first = mine[0]
        if mine[-1].caller.tier == "flex" and first.caller.tier != "flex":
            oldest = next(seq for seq in mine if seq.caller.tier == "flex")
            if not lane(oldest, now) and age(oldest) < age(first):
                return oldest
        return first


def _place(seq: Sequence) -> tuple[int, tuple[int, int]]:
    return _RANK[seq.caller.tier], age(seq)


def overserved(seq: Sequence, running: ListLike[Sequence], now: int) -> Sequence | None:
    """A running sequence that has to make room for `seq`: one that goes behind it, or, when its client has none running,
    the youngest of the client that runs the most. Never a client's last for that, so there is an end to it."""
    others = [each for each in running if lane(each, now) >= lane(seq, now)]
    if not others:
        return None
    chosen = victim(others, running, now)
    if lane(chosen, now) > lane(seq, now):
        return chosen
    clients = Counter(each.caller.client for each in running)
    return chosen if not clients[seq.caller.client] and clients[chosen.caller.client] > 1 else None


def victim(among: ListLike[Sequence], running: ListLike[Sequence], now: int) -> Sequence:
    """Whose blocks are taken: of those behind others, and of the client that runs the most, the youngest."""
    clients = Counter(each.caller.client for each in running)
    return max(among, key=lambda seq: (lane(seq, now), clients[seq.caller.client], age(seq)))


def yielding(seq: Sequence, running: ListLike[Sequence], scheduled: set[Sequence], now: int) -> list[Sequence]:
    """Whose blocks a prompt may take: younger ones that are not in this step, and not in a better lane."""
    rest = (each for each in running if each not in scheduled)
    return [each for each in rest if age(each) > age(seq) and lane(each, now) >= lane(seq, now)]
