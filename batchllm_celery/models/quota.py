"""A provider quota as the fleet shares it, by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from batchllm_celery.models.base import MOST, Model
from batchllm_celery.models.names import check_label

#: Smallest limit: one request in about two years.
LEAST = 1e-6


def _number(value: object) -> object:
    return math.inf if isinstance(value, str) and value.strip().lower() == "unlimited" else value


def _word(value: Any) -> Any:
    return "unlimited" if value == math.inf else value


def _whole(value: float | None) -> float | None:
    if value is None or value == math.inf:
        return value
    if value != int(value):
        raise ValueError("must be a whole number or unlimited")
    return int(value)


def _within_reach(value: float | None) -> float | None:
    if value is not None and value != math.inf and not LEAST <= value <= MOST:
        raise ValueError(f"must be {LEAST} to {MOST}, or unlimited")
    return value


_Positive = Annotated[float, Field(gt=0)]
_Rate = Annotated[
    _Positive | None,
    BeforeValidator(_number),
    AfterValidator(_within_reach),
    PlainSerializer(_word, when_used="json"),
]
_Count = Annotated[_Rate, AfterValidator(_whole)]


class QuotaLimits(Model):
    """What the provider allows. None: unknown, so the rate starts low and grows until the provider
    refuses. `math.inf`, or "unlimited": there is no such limit.

    `tokens_per_minute` counts input + output. Any subset may be given.
    """

    requests_per_minute: _Rate = None
    tokens_per_minute: _Rate = None
    input_tokens_per_minute: _Rate = None
    output_tokens_per_minute: _Rate = None
    requests_per_day: _Count = None
    max_concurrency: _Count = None

    @classmethod
    def unlimited(cls) -> Self:
        """No limit at all: as many calls as there are slots, until the provider refuses one."""
        return cls(**dict.fromkeys(cls.model_fields, math.inf))

    def given(self) -> dict[str, float]:
        """The limits that are set, by name; infinity for one that is unlimited."""
        return {name: value for name, value in self if value is not None}

    def finite(self) -> dict[str, float]:
        """The limits that limit something, by name."""
        return {name: value for name, value in self.given().items() if value != math.inf}

    @property
    def full_speed(self) -> bool:
        """Whether calls begin as fast as slots allow: a rate is unlimited, and no rate is known."""
        rates = list(self._rates())
        return math.inf in rates and all(rate == math.inf for rate in rates)

    def _rates(self) -> Iterator[float]:
        return (value for name, value in self.given().items() if name.endswith("per_minute"))


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
        adaptive_concurrency: find out from the throughput how many calls in flight the provider
            has room for, within `limits.max_concurrency`: for servers of one's own that slow down
            under load. (A server that refuses what is too much needs no such setting.)
    """

    name: str
    limits: QuotaLimits = QuotaLimits()
    policy: CooldownPolicy = CooldownPolicy()
    burst_seconds: float = Field(default=0.1, ge=0, le=60)
    horizon_seconds: float = Field(default=2.0, gt=0, le=30)
    day_exhausted: Literal["park", "fail"] = "park"
    adaptive_concurrency: bool = False

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_label(name, "quota name")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.policy.kind == "slow_start" and not self.policy.cooldowns:
            raise ValueError(f"quota {self.name!r}: a slow_start policy needs a cooldown")
        return self
