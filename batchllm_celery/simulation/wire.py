"""What all wire formats share: an answer, an error, a retry header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
