"""Prefixes on disk: what comes back is what was written, whatever happened to the files; and engines that live on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollamapy.engine import prefix_reading, prefixes
from ollamapy.engine.engine import Engine
from ollamapy.engine.prefix_store import PrefixStore
from ollamapy.engine.protocol import Plan
from tests.engine.device import Emulated
from tests.engine.fake import GROUPS, FakeModel, Run

ROOT = Path(__file__).parents[2]
PAGE = bytes(range(256)) * 16
D = [bytes([i]) * 16 for i in range(40)]


def opened(folder: Path, identity: str = "model", limit: int = 1 << 30) -> PrefixStore:
    return PrefixStore(folder, limit, identity)


def written(folder: Path, *digests: bytes, **more: object) -> PrefixStore:
    store = opened(folder, **more)  # type: ignore[arg-type]
    for digest in digests:
        assert store.offer(digest, {0: PAGE, 2: digest * 256})
    assert store.flush(10)
    return store


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.kv"))


def read(store: PrefixStore, *digests: bytes) -> list[bytes]:
    """The digests whose pages came back whole."""
    reading, found = store.read(digests), []
    while not reading.has_ended:
        page = reading.next(10)
        if page is not None:
            assert {group: bytes(content) for group, content in page.pages.items()} == {0: PAGE, 2: page.digest * 256}
            found.append(page.digest)
            reading.done(page)
    assert store.buffers.num_lent == 0
    return found


def test_what_was_written_is_read_after_a_restart(tmp_path: Path) -> None:
    written(tmp_path / "p", *D[:3])
    store = opened(tmp_path / "p")
    assert store.has(D[0], 0b101) and not store.has(D[0], 0b10) and not store.has(D[9], 1)
    assert read(store, D[0], D[1], D[2]) == D[:3] and read(store, D[0], D[9], D[1]) == D[:1]
    assert store.num_bad == 0 and store.check() == []


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    written(tmp_path / "p", D[0])
    for path in (tmp_path / "p").rglob("*"):
        assert path.stat().st_mode & 0o77 == 0, path
    assert (tmp_path / "p").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("place", [0, 9, 30, 50, 60, 5000, 8200, -1])
def test_a_changed_byte_is_found_out(tmp_path: Path, place: int) -> None:
    written(tmp_path, *D[:2])
    path = files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    store = opened(tmp_path)
    assert read(store, D[0], D[1]) == [] and store.num_bad == 1
    assert not path.exists() and not store.has(D[0], 1)
    assert read(store, D[1]) == D[1:2]


@pytest.mark.parametrize("size", [0, 10, 56, 4000, 8000, 20000])
def test_a_cut_or_long_file_is_found_out(tmp_path: Path, size: int) -> None:
    written(tmp_path, D[0])
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"x"))
    store = opened(tmp_path)
    assert read(store, D[0]) == [] and store.num_bad == 1 and files(tmp_path) == []


def test_content_of_another_layout_is_not_taken(tmp_path: Path) -> None:
    written(tmp_path, D[0], identity="f16")
    other = opened(tmp_path, "f32")
    assert not other.has(D[0], 1)
    moved = other._folder / files(tmp_path)[0].name
    moved.write_bytes(files(tmp_path)[0].read_bytes())
    again = opened(tmp_path, "f32")
    assert again.has(D[0], 1) and read(again, D[0]) == [] and again.num_bad == 1
    moved = other._folder / files(tmp_path)[0].name.replace("00", "01")
    moved.write_bytes(files(tmp_path)[0].read_bytes())
    (tmp_path / "key").write_bytes(b"y" * 32)
    assert read(opened(tmp_path, "f16"), D[0]) == [], "another secret names other folders"


def test_two_engines_share_a_folder(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.key == second.key
    for store in (first, second):
        for digest in D[:20]:
            assert store.offer(digest, {0: PAGE, 2: digest * 256})
    assert first.flush(10) and second.flush(10)
    assert read(first, *D[:20]) == D[:20] and len(files(tmp_path)) == 20
    for path in files(tmp_path):
        path.unlink()
    assert read(second, *D[:3]) == [] and second.num_bad == 0, "what another has deleted is not damage"


def test_pages_are_added_to_a_block(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.offer(D[0], {0: PAGE})
    store.offer(D[0], {0: PAGE, 2: D[0] * 256})
    assert store.flush(10) and read(store, D[0]) == D[:1] and len(files(tmp_path)) == 1


def test_the_least_used_go_first(tmp_path: Path) -> None:
    store = written(tmp_path, *D[:8])
    size = files(tmp_path)[0].stat().st_size
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 + age, 1000 + age))
    assert read(store, D[0]) == D[:1]
    small = opened(tmp_path, limit=5 * size)
    small.offer(D[9], {0: PAGE, 2: D[9] * 256})
    assert small.flush(10)
    time.sleep(0.05)
    kept = [path.stem[:2] for path in files(tmp_path)]
    assert len(kept) <= 5 and {"00", "09"} <= set(kept)


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollamapy.engine.prefix_store.MAX_QUEUED", 3 * len(PAGE))
    monkeypatch.setattr(PrefixStore, "_write", lambda *_: time.sleep(0.2))
    store = opened(tmp_path)
    assert [store.offer(digest, {0: PAGE}) for digest in D[:5]] == [True, True, True, False, False] and store.is_full
    assert store.check() == [] and store.flush(10) and not store.is_full


CHILD = """
import resource
import sys
from pathlib import Path
from ollamapy.engine.prefix_store import PrefixStore
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
store = PrefixStore(Path(sys.argv[1]), 1 << 30, "model")
print("ready", flush=True)
n = 0
while n < int(sys.argv[2]):
    digest = bytes([n % 40]) * 16
    n += store.offer(digest, {0: bytes(range(256)) * 16, 2: digest * 256})
store.flush(20)
print(store.num_failed, store.num_written, store.is_paused)
"""


def child(folder: Path, count: int, largest: int = 1 << 40) -> subprocess.Popen[str]:
    """Offers `count` pages; `largest`: bytes of a file, as on a disk that is full. The limit is the child's alone: this process
    may be writing its log to a file."""
    command = [sys.executable, "-c", CHILD, str(folder), str(count), str(largest)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_full_disk_stops_the_writing_only(tmp_path: Path) -> None:
    process = child(tmp_path, 30, largest=2000)
    out, _ = process.communicate(timeout=60)
    assert out.split() == ["ready", "1", "0", "True"] and process.returncode == 0
    assert files(tmp_path) == [] and list(tmp_path.glob("*/tmp-*")) == []


def test_killed_while_writing(tmp_path: Path) -> None:
    for delay in (0.0, 0.01, 0.03, 1.0):  # after the last, something is there on a slow machine too
        process = child(tmp_path, 10**6)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = opened(tmp_path)
        there = [digest for digest in D if store.has(digest, 1)]
        assert [digest for digest in there if read(store, digest)] == there and store.num_bad == 0
    assert there


# --- engines ------------------------------------------------------------------------------------------------------

PROMPT = [(7 * i) % 89 for i in range(100)]


def running(folder: Path, overlap: bool = False, **plan: object) -> Run:
    run = Run(**plan)
    run.engine = Engine(FakeModel(), run.engine.plan, store=opened(folder), accelerator=Emulated() if overlap else None)
    return run


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "UNMEASURED_TOKENS", 8)
    monkeypatch.setattr(prefixes.Costs, "computed", lambda *_: None)


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_a_second_use_is_kept_and_outlives_the_engine(tmp_path: Path, groups: object) -> None:
    first = running(tmp_path, groups=groups, num_blocks=100)
    expected = first.one(PROMPT, max_tokens=8).tokens
    assert files(tmp_path) == [], "nothing shows yet that it is shared"
    assert first.one(PROMPT, max_tokens=8).tokens == expected
    store = first.engine.prefixes.store  # type: ignore[union-attr]
    assert store.flush(10) and len(files(tmp_path)) == 24

    second = running(tmp_path, groups=groups, num_blocks=100)
    answer = second.one(PROMPT, max_tokens=8)
    assert answer.tokens == expected and answer.finish is not None and answer.finish.cached_tokens == 96
    assert second.engine.stats().disk_read_tokens == 96
    salted = second.one(PROMPT, max_tokens=8, cache_salt="other")
    assert salted.tokens == expected and salted.finish is not None and salted.finish.cached_tokens == 0


def test_choices_of_one_request_are_one_use(tmp_path: Path) -> None:
    run = running(tmp_path, num_blocks=100)
    for choice in range(3):
        run.add(choice, PROMPT, max_tokens=8, later=choice > 0)
    answers = run.drain()
    finish = answers[2].finish
    assert finish is not None and finish.cached_tokens == 99, "they share its blocks"
    store = run.engine.prefixes.store  # type: ignore[union-attr]
    assert store.flush(10) and files(tmp_path) == []
    run.one(PROMPT, max_tokens=8)
    assert store.flush(10) and len(files(tmp_path)) == 24


def test_a_chat_s_next_turn_writes_the_turns_before(tmp_path: Path) -> None:
    """Its answers too: they are what it says of itself."""
    run = running(tmp_path, num_blocks=100)
    answer = run.one(PROMPT, max_tokens=20).tokens
    store = run.engine.prefixes.store  # type: ignore[union-attr]
    assert store.flush(10) and files(tmp_path) == []
    run.one([*PROMPT, *answer, 1, 2, 3], max_tokens=20)
    assert store.flush(10) and len(files(tmp_path)) == (100 + 19) // 4


def test_a_damaged_file_costs_time_only(tmp_path: Path) -> None:
    first = running(tmp_path)
    expected = first.one(PROMPT, max_tokens=8).tokens
    first.one(PROMPT, max_tokens=8)
    assert first.engine.prefixes.store.flush(10)  # type: ignore[union-attr]
    for path in files(tmp_path)[::5]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    second = running(tmp_path)
    assert second.one(PROMPT, max_tokens=8).tokens == expected
    assert second.engine.stats().disk_bad_files == 1 and second.engine.stats().integrity == "ok"


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_on_a_small_pool(tmp_path: Path, overlap: bool) -> None:
    """Restores and preemptions together; one of those that wait is aborted. With steps that overlap, too."""
    first = running(tmp_path, num_blocks=40)
    expected = [first.one(PROMPT[: 60 + i], max_tokens=30).tokens for i in range(8)]
    assert first.engine.prefixes.store.flush(10)  # type: ignore[union-attr]
    second = running(tmp_path, overlap, num_blocks=40, max_batch_tokens=16)
    for i in range(8):
        second.add(i, PROMPT[: 60 + i], max_tokens=30)
    assert second.engine.prefixes.num_waiting > 0  # type: ignore[union-attr]
    second.engine.abort(7)
    answers = second.drain()
    assert [answers[i].tokens for i in range(7)] == expected[:7]
    assert answers[7].finish is not None and answers[7].finish.reason == "abort"
    assert (second.engine.stats().num_ahead > 0) == overlap


def test_reading_is_chosen_by_cost() -> None:
    costs = prefixes.Costs(prefill=1e-3, bandwidth=1e9)
    assert costs.worth_reading(1000, 10**8) and not costs.worth_reading(1000, 10**9), "0.1 s, 1 s against a second"
    assert not costs.worth_reading(32, 1000), "too short for a file"


def test_no_store_without_a_folder() -> None:
    assert Run().engine.prefixes is None and Plan("m").prefix_folder == ""


def test_buffers_go_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them for 30 files; readings that nobody wants any more give theirs back and do not hold up the next."""
    monkeypatch.setattr(prefix_reading, "BUFFER_BYTES", 3 * (2 * len(PAGE) + 200))
    store = written(tmp_path, *D[:30])
    for taken in (0, 1, 5, 29):
        left = store.read(D[:30])
        for _ in range(taken):
            page = left.next(10)
            assert page is not None
            left.done(page)
        left.cancel()
    assert read(store, *D[:30]) == D[:30] and store.buffers.num_lent == 0
    held = store.read(D[:5])
    pages = [held.next(10) for _ in range(3)]
    assert None not in pages and held.next(0.2) is None and not held.has_ended, "all buffers are with whoever is slow"
    assert store.buffers._count == store.buffers.num_lent == 3
    for page in pages:
        assert page is not None and bytes(page.pages[0]) == PAGE
        held.done(page)
    while not held.has_ended:
        if (page := held.next(10)) is not None:
            held.done(page)
    assert store.buffers.num_lent == 0


def test_a_page_that_needs_a_larger_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_reading, "BUFFER_BYTES", 0)
    store = opened(tmp_path)
    for number, digest in enumerate(D[:6]):
        assert store.offer(digest, dict.fromkeys(range(1 + number % 3), PAGE))
    assert store.flush(10)
    reading, sizes = store.read(D[:6]), []
    while not reading.has_ended:
        if (page := reading.next(10)) is not None:
            assert all(bytes(content) == PAGE for content in page.pages.values())
            sizes.append(len(page.pages))
            reading.done(page)
    assert sizes == [1, 2, 3] * 2 and store.buffers.num_lent == 0
