"""A provider quota as the fleet shares it, by name."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from batchllm_celery.models.base import Model

#: Redis hash tags end at the first brace, so a name must not hold one.
_NAME = re.compile(r"[^{}\s]{1,200}")


def check_name(what: str, name: str) -> str:
    """A name that can be a part of a Redis key, and of a line that people read.

    Raises:
        ValueError: it has spaces, braces or control characters, or is too long.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable():
        raise ValueError(
            f"{what} name {str(name)[:80]!r} must be 1 to 200 characters without spaces or braces"
        )
    return name


class QuotaLimits(Model):
    """What the provider allows; None means not limited (or not known).

    `tokens_per_minute` counts input + output. Any subset may be given.
    """

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    input_tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    output_tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    requests_per_day: int | None = Field(default=None, gt=0)
    max_concurrency: int | None = Field(default=None, gt=0)

    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in self if value is not None}


class CooldownPolicy(Model):
    """What the fleet does after a 429, as data that the limiter's scripts read.

    Args:
        kind: `adaptive` (cooldown of what the provider asks, then a CUBIC rate) or `slow_start`
            (the listed cooldowns, then starts spaced by `ramp`).
        cooldowns: seconds of the 1st, 2nd, ... cooldown in a row; the last one repeats.
        ramp: seconds between the starts after a cooldown, fleet-wide.
        ramp_repeats: whether the last spacing stays for good (`FixedDelayStrategy`).
        max_cooldown: seconds; what a Retry-After is clamped to.
    """

    kind: Literal["adaptive", "slow_start"] = "adaptive"
    cooldowns: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
    ramp: tuple[float, ...] = ()
    ramp_repeats: bool = False
    max_cooldown: float = 600.0


class Quota(Model):
    """A named quota: its limits and what follows a 429. The policy belongs to the quota.

    Args:
        name: shared by everything that draws on it; default PROVIDER:MODEL.
        limits: the provider's limits.
        policy: what follows a 429.
        burst_seconds: how many seconds' worth of a minute's rate may start at once, at most
            (providers check sub-windows of 1 s and 10 s).
        horizon_seconds: how far ahead start times are handed out; what a dead worker loses at most.
        day_exhausted: `park` the batch until the day's reset, or `fail` its items.
    """

    name: str
    limits: QuotaLimits = QuotaLimits()
    policy: CooldownPolicy = CooldownPolicy()
    burst_seconds: float = Field(default=0.1, ge=0, le=60)
    horizon_seconds: float = Field(default=2.0, gt=0, le=30)
    day_exhausted: Literal["park", "fail"] = "park"

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_name("quota", name)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy.kind == "slow_start" and not self.policy.cooldowns:
            raise ValueError(f"quota {self.name!r}: a slow_start policy needs a cooldown")
        return self
