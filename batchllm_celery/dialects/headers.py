"""What the headers of a reply say: how long to wait, the provider's limits, the request's id."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from batchllm_celery.models.rate_limits import LimitWindow, RateLimits

#: Nothing that a provider can ask for is longer than the day that its longest quota has, with an
#: hour for the change to winter time.
MOST_SECONDS = 25 * 3600.0

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ms|d|h|m|s)")
_DIMENSIONS = ("requests", "tokens", "input_tokens", "output_tokens")


def lowered(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers by their names in lower case, as HTTP means them."""
    return {str(name).lower(): str(value) for name, value in (headers or {}).items()}


def server_time(headers: Mapping[str, str]) -> float:
    """The reply's own `date`, else this machine's clock: seconds since 1970."""
    date = _date(headers.get("date", ""))
    return time.time() if date is None else date


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms` or `retry-after` (seconds or a date), at most 25 hours;
    None without."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return clamped(milliseconds / 1000)
    text = headers.get("retry-after", "")
    seconds = _number(text)
    if seconds is None and text:
        date = _date(text)
        seconds = None if date is None else date - server_time(headers)
    return None if seconds is None else clamped(seconds)


def clamped(seconds: float) -> float:
    """A wait within what a provider can mean."""
    return min(max(seconds, 0.0), MOST_SECONDS)


def seconds_of(text: str) -> float | None:
    """`1m2.5s`, `120ms`, `6s`, or a bare number of seconds."""
    text = text.strip().lower()
    amounts = _AMOUNT.findall(text)
    if amounts and "".join(number + unit for number, unit in amounts) == text:
        return sum(float(number) * _UNITS[unit] for number, unit in amounts)
    return _number(text)


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The provider's id of the request, for its support."""
    for name in ("x-request-id", "request-id", "x-goog-request-id", "apim-request-id"):
        if headers.get(name):
            return headers[name][:200]
    return None


def rate_limits_of(headers: Mapping[str, str]) -> RateLimits | None:
    """Limits by `x-ratelimit-*` (OpenAI, Azure, Groq and others) or `anthropic-ratelimit-*`; None
    where no header names one.

    `headers` have lower-case names. Dates are read against the reply's own `date`.
    """
    windows = {
        name: _openai_window(headers, name) or _anthropic_window(headers, name)
        for name in _DIMENSIONS
    }
    return RateLimits.model_validate(windows) if any(windows.values()) else None


def _openai_window(headers: Mapping[str, str], dimension: str) -> LimitWindow | None:
    limit, remaining, reset = (
        headers.get(f"x-ratelimit-{field}-{dimension.replace('_', '-')}", "")
        for field in ("limit", "remaining", "reset")
    )
    return _window(limit, remaining, seconds_of(reset))


def _anthropic_window(headers: Mapping[str, str], dimension: str) -> LimitWindow | None:
    name = f"anthropic-ratelimit-{dimension.replace('_', '-')}"
    reset = _iso_date(headers.get(f"{name}-reset", ""))
    seconds = None if reset is None else reset - server_time(headers)
    return _window(headers.get(f"{name}-limit", ""), headers.get(f"{name}-remaining", ""), seconds)


def _window(limit: str, remaining: str, reset: float | None) -> LimitWindow | None:
    most, left = _number(limit), _number(remaining)
    if most is None and left is None:
        return None
    return LimitWindow(
        limit=most, remaining=left, reset_seconds=None if reset is None else max(reset, 0.0)
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _iso_date(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
