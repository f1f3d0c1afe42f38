"""What a provider's reply says about its limits."""

from __future__ import annotations

from pydantic import Field

from batchllm_celery.models.base import Model

_MINUTE, _DAY = 60.0, 86_400.0


class LimitWindow(Model):
    """One dimension as the headers of one reply give it.

    Args:
        limit: what the window allows.
        remaining: what is left of it; others may use the same key.
        reset_seconds: seconds from the reply until it is whole again.
    """

    limit: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    remaining: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    reset_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    def window_seconds(self) -> float | None:
        """60 for a minute, 86400 for a day, None if the headers don't say.

        A bucket that refills evenly says so by all three numbers: what is used comes back within
        `reset_seconds`, so the whole comes back within `limit / used` times that. A fixed window
        can't be longer than a day, and one that resets in more than a minute is no minute.
        """
        if self.limit is None or self.remaining is None or self.reset_seconds is None:
            return None
        used = self.limit - self.remaining
        if used > 0:
            refill = self.reset_seconds * self.limit / used
            for window in (_MINUTE, _DAY):
                if 0.8 * window <= refill <= 1.25 * window:
                    return window
        return _DAY if _MINUTE < self.reset_seconds <= _DAY else None


class RateLimits(Model):
    """The limits in a reply's headers; a dimension that they do not name is None.

    `quota` is the PROVIDER:MODEL that they belong to: they bind the quota of that name only.
    """

    requests: LimitWindow | None = None
    tokens: LimitWindow | None = None
    input_tokens: LimitWindow | None = None
    output_tokens: LimitWindow | None = None
    quota: str | None = None
