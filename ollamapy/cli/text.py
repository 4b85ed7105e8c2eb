"""How the command line shows sizes, times and tables: Ollama's forms, so that scripts which read them go on working."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

UNITS = ("B", "KB", "MB", "GB", "TB")
FOREVER = timedelta(days=20 * 365)  # anything that far away is shown as "Forever"


def human_bytes(size: int) -> str:
    """Decimal units; one decimal below ten unless it is zero: 271 MB, 4.7 GB, 4 GB."""
    unit = 0
    while size >= 1000 ** (unit + 1) and unit < len(UNITS) - 1:
        unit += 1
    value = size / 1000**unit
    return f"{int(value)} {UNITS[unit]}" if value >= 10 or value.is_integer() else f"{value:.1f} {UNITS[unit]}"


def human_duration(seconds: float) -> str:
    """One unit: "3 weeks", "About a minute", "Less than a second"."""
    whole, hours = int(seconds), int(seconds / 3600 + 0.5)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    if whole < 120:
        return "About a minute"
    if whole < 3600:
        return f"{whole // 60} minutes"
    if hours == 1:
        return "About an hour"
    for limit, length, name in ((48, 1, "hours"), (14 * 24, 24, "days"), (60 * 24, 7 * 24, "weeks"), (730 * 24, 720, "months")):
        if hours < limit:
            return f"{hours // length} {name}"
    return f"{whole // 3600 // 24 // 365} years"


def human_time(moment: datetime | None, now: datetime, *, zero: str = "Never") -> str:
    """ "4 minutes from now", "3 weeks ago", "Forever"; `zero` for no time at all."""
    if moment is None:
        return zero
    distance = moment - now
    if distance > FOREVER:
        return "Forever"
    if distance > timedelta(0):
        return f"{human_duration(distance.total_seconds())} from now"
    return f"{human_duration(-distance.total_seconds())} ago"


def parse_time(text: str) -> datetime | None:
    """RFC 3339; None for Go's zero time. Digits below the microsecond are dropped."""
    moment = datetime.fromisoformat(text)
    return None if moment.year == 1 else moment


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: 1.234567891s, 45.6ms, 1m3.5s."""
    if nanoseconds == 0:
        return "0s"
    for limit, divisor, unit in ((10**3, 1, "ns"), (10**6, 10**3, "µs"), (10**9, 10**6, "ms")):
        if nanoseconds < limit:
            return _decimal(nanoseconds, divisor) + unit
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    tail = _decimal(rest, 10**9) + "s"
    return f"{minutes // 60}h{minutes % 60}m{tail}" if minutes >= 60 else f"{minutes}m{tail}" if minutes else tail


def _decimal(value: int, divisor: int) -> str:
    """value / divisor, a power of ten, exactly."""
    whole, rest = divmod(value, divisor)
    fraction = str(divisor + rest)[1:].rstrip("0")
    return f"{whole}.{fraction}" if fraction else str(whole)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, four spaces apart, no borders."""
    return "\n".join(columns([header, *rows]))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; rows may have fewer cells than others."""
    count = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(count)]
    return ["    ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
