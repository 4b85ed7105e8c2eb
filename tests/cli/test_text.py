"""Sizes, times and tables as Ollama shows them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ollamapy.cli import text

NOW = datetime(2025, 11, 3, 12, 0, tzinfo=UTC)
HOUR, DAY = 3600, 86400


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1500, "1.5 KB"),
        (9_990, "10.0 KB"),
        (10_500, "10 KB"),
        (97_954_000, "97 MB"),
        (4_000_000_000, "4 GB"),
        (4_661_224_676, "4.7 GB"),
        (999_999_999, "999 MB"),
        (12_300_000_000_000, "12 TB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_human_bytes(size: int, shown: str) -> None:
    assert text.human_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.99, "Less than a second"),
        (1.9, "1 second"),
        (59.9, "59 seconds"),
        (60, "About a minute"),
        (119, "About a minute"),
        (120, "2 minutes"),
        (3599, "59 minutes"),
        (1.4 * HOUR, "About an hour"),
        (1.5 * HOUR, "2 hours"),
        (47.4 * HOUR, "47 hours"),
        (47.6 * HOUR, "2 days"),
        (13 * DAY, "13 days"),
        (14 * DAY, "2 weeks"),
        (59 * DAY, "8 weeks"),
        (60 * DAY, "2 months"),
        (729 * DAY, "24 months"),
        (731 * DAY, "2 years"),
    ],
)
def test_human_duration(seconds: float, shown: str) -> None:
    assert text.human_duration(seconds) == shown


def test_human_time() -> None:
    assert text.human_time(None, NOW) == "Never"
    assert text.human_time(NOW + timedelta(minutes=4.5), NOW) == "4 minutes from now"
    assert text.human_time(NOW - timedelta(days=22), NOW) == "3 weeks ago"
    assert text.human_time(NOW + timedelta(days=365 * 292), NOW) == "Forever"
    assert text.human_time(NOW, NOW) == "Less than a second ago"


def test_parse_time() -> None:
    assert text.parse_time("0001-01-01T00:00:00Z") is None
    assert text.parse_time("2025-11-03T12:00:00.123456789Z") == NOW + timedelta(microseconds=123456)
    assert text.parse_time("2025-11-03T14:00:00+02:00") == NOW


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_500, "1.5µs"),
        (45_600_000, "45.6ms"),
        (999_999_999, "999.999999ms"),
        (1_234_567_891, "1.234567891s"),
        (10**9, "1s"),
        (63_500_000_000, "1m3.5s"),
        (3_600_000_000_000, "1h0m0s"),
        (90_061_000_000_001, "25h1m1.000000001s"),
    ],
)
def test_go_duration(nanoseconds: int, shown: str) -> None:
    assert text.go_duration(nanoseconds) == shown


def test_table() -> None:
    assert text.table(("NAME", "ID"), []) == "NAME    ID"
    assert text.table(("NAME", "ID"), [("smollm2:135m", "81b8")]).splitlines() == ["NAME            ID", "smollm2:135m    81b8"]


def test_columns_of_uneven_rows() -> None:
    assert text.columns([("stop", '"a"'), ("alone",), ("", "x", "y")]) == ['stop     "a"', "alone", "         x      y"]
    assert text.columns([]) == []
