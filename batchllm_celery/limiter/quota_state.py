"""A quota as a person looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from batchllm_celery.models import CooldownPolicy, Model, Quota, QuotaLimits


class QuotaState(Model):
    """One moment of a quota. Moments are seconds since 1970 (Redis' clock), durations seconds.

    Args:
        allowed_per_minute: requests a minute now (after cuts); None: not limited. None too for
            quotas that are limited by tokens only: see `rate_factor`.
        rate_factor: share of the configured rates that is allowed now (1.0: all of it).
        owed_seconds: by dimension, how far starts lie ahead of now: 0 means room.
        waiting: processes with waiters.
        cooldown_remaining: seconds until the cooldown ends; 0 without one.
        consecutive: cooldowns in a row without a success.
        ramp_position: starts since the last cooldown; None when no slow start is under way.
        probing: the breaker is open: one call at a time.
    """

    name: str
    limits: QuotaLimits = QuotaLimits()
    policy: CooldownPolicy = CooldownPolicy()
    allowed_per_minute: float | None = None
    rate_factor: float = 1.0
    owed_seconds: dict[str, float] = Field(default_factory=dict)
    waiting: int = 0
    in_flight: int = 0
    generation: int = 0
    cooldown_remaining: float = 0.0
    consecutive: int = 0
    failures_in_a_row: int = 0
    probing: bool = False
    ramp_position: int | None = None
    day_used: int = 0
    day_resets_at: float | None = None
    exhausted_until: float | None = None


_DIMENSIONS = {"r": "requests", "t": "tokens", "i": "input_tokens", "o": "output_tokens"}


def read_state(
    name: str, now: int, waiting: int, config: bytes, fields: Mapping[str, float]
) -> QuotaState:
    """The state from what state.lua answers; `now` in microseconds."""

    def number(field: str) -> float:
        return fields.get(field, 0.0)

    quota = Quota.model_validate_json(config) if config else Quota(name=name)
    rates = {label: number(f"rate_{d}") for d, label in _DIMENSIONS.items()}
    known = any(rates.values())
    pace = number("pace") if "pace" in fields else float(known)
    per_second = number("rate_r") * pace if known else pace
    day_until, ramp = number("day_until"), number("ramp_i")
    values: dict[str, Any] = {
        "name": name,
        "limits": quota.limits,
        "policy": quota.policy,
        "allowed_per_minute": per_second * 60 or None,
        "rate_factor": pace if known else 1.0,
        "owed_seconds": {
            label: max(number(f"tat_{d}") - now, 0) / 1e6
            for d, label in _DIMENSIONS.items()
            if rates[label] or (d == "r" and not known)
        },
        "waiting": waiting,
        "in_flight": int(number("in_flight")),
        "generation": int(number("gen")),
        "cooldown_remaining": max(number("cool_until") - now, 0) / 1e6,
        "consecutive": int(number("consecutive")),
        "failures_in_a_row": int(number("fails")),
        "probing": number("fails") >= 5,
        "ramp_position": int(ramp)
        if 0 <= ramp < len(quota.policy.ramp) and _ramp_on(quota)
        else None,
        "day_used": int(number("day_used")) if now < number("day_reset") else 0,
        "day_resets_at": number("day_reset") / 1e6 or None,
        "exhausted_until": day_until / 1e6 if day_until > now else None,
    }
    return QuotaState(**values)


def _ramp_on(quota: Quota) -> bool:
    return quota.policy.kind == "slow_start"
