"""What all wire formats share: an answer, an error, a retry header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from batchllm_celery.simulation.config import RateLimitHeaders
from batchllm_celery.simulation.quotas import QuotaRefusal


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An HTTP answer with a JSON body."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


class WireError(Exception):
    """A request that is wrong, not yet written as an error of its wire format.

    Args:
        status: HTTP status.
        message: what is wrong.
        details: Gemini's details.
        headers: headers of the answer.
        code: OpenAI's error code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        details: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.details = list(details)
        self.headers = headers or {}
        self.code = code


def retry_after_header(refusal: QuotaRefusal) -> dict[str, str]:
    """Whole seconds, rounded up, as HTTP has it."""
    return {"Retry-After": str(max(1, math.ceil(refusal.retry_after)))}


_DIMENSIONS = {
    "rpm": "requests",
    "rpd": "requests",
    "tpm": "tokens",
    "input_tpm": "input-tokens",
    "output_tpm": "output-tokens",
}


def rate_limit_headers(
    form: RateLimitHeaders | None, left: Mapping[str, tuple[float, float, float]], now: float
) -> dict[str, str]:
    """The limits as headers.

    Args:
        form: whose; None: nobody's.
        left: by limit its size, what is left of it, the seconds until all of it is.
        now: Unix seconds, for headers that hold a date.
    """
    headers: dict[str, str] = {}
    for limit, (size, remaining, reset) in left.items():
        name = _DIMENSIONS[limit]
        if limit == "rpd" and "rpm" in left:
            continue  # there is one header for both
        numbers = {"limit": f"{size:.0f}", "remaining": f"{max(math.floor(remaining), 0)}"}
        if form is RateLimitHeaders.OPENAI:
            numbers["reset"] = _openai_duration(reset)
            headers |= {f"x-ratelimit-{field}-{name}": text for field, text in numbers.items()}
        elif form is RateLimitHeaders.ANTHROPIC:
            moment = datetime.fromtimestamp(math.ceil(now + reset), UTC)
            numbers["reset"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
            headers |= {
                f"anthropic-ratelimit-{name}-{field}": text for field, text in numbers.items()
            }
    return headers


def _openai_duration(seconds: float) -> str:
    """`120ms`, `6.5s`, `1m2.5s`, `7h12m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
