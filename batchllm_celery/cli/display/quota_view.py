"""The state of a quota and of a batch, in a few words."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from batchllm_celery.cli.display.tables import FittingTable
from batchllm_celery.cli.display.wording import count, duration, short
from batchllm_celery.models import BatchProgress, BatchState, QuotaLimits

if TYPE_CHECKING:
    from batchllm_celery.limiter import QuotaState

_SHORT_NAMES = {
    "requests_per_minute": "rpm",
    "tokens_per_minute": "tpm",
    "input_tokens_per_minute": "input tpm",
    "output_tokens_per_minute": "output tpm",
    "requests_per_day": "a day",
    "max_concurrency": "at once",
}


def limits_words(limits: QuotaLimits) -> str:
    """`600 rpm, 1.0M tpm`; `unlimited`; `no quota` if no limit was given."""
    finite = [f"{short(value)} {_SHORT_NAMES[name]}" for name, value in limits.finite().items()]
    return ", ".join(finite) or ("unlimited" if limits.given() else "no quota")


def quota_words(state: QuotaState, now: float) -> str:
    """Why calls wait for the quota; empty if none waits."""
    if state.exhausted_until is not None and state.exhausted_until > now:
        return f"the day's quota is used up, {duration(state.exhausted_until - now)} to its reset"
    if state.cooldown_remaining > 0:
        left = duration(state.cooldown_remaining)
        if not state.consecutive:
            return f"waiting {left}: Redis was started after the last calls, which may still count"
        return f"cooling down for {left} after a refusal"
    if state.probing:
        return "the provider is refusing; trying one call at a time"
    if state.ramp_position is not None:
        return f"starting slowly after a refusal ({count(state.ramp_position)} starts)"
    if state.waiting and state.rate_factor < 0.99:
        return f"at {state.rate_factor:.0%} of the quota after refusals"
    if not state.waiting:
        return ""
    if state.room is not None and state.in_flight >= 0.8 * state.room:
        return f"at the server's room: {count(state.room)} calls at once"
    if state.reported and state.reported_binds:
        return "at the speed in the provider's headers"
    if (state.limits.finite().get("max_concurrency") or math.inf) <= state.in_flight:
        return "at the calls at once that were set"
    return "at the quota's speed" if state.limits.finite() else "finding the provider's rate"


_DIMENSIONS = {
    "requests": "rpm",
    "tokens": "tpm",
    "input_tokens": "input tpm",
    "output_tokens": "output tpm",
}


def learnt_words(state: QuotaState) -> str:
    """What was not set but found out: by the provider's headers, its refusals or its throughput."""
    parts = []
    told = [f"{short(rate)} {_DIMENSIONS[name]}" for name, rate in state.reported.items()]
    if state.reported_per_day:
        told.append(f"{short(state.reported_per_day)} a day")
    if told:
        of_another = "" if state.reported_binds else ", of another quota"
        parts.append(f"{', '.join(told)} (the provider's headers{of_another})")
    if state.room is not None:
        how = "throughput" if state.adaptive_concurrency else "overloads"
        parts.append(f"{count(state.room)} at once (by {how})")
    if not state.limits.finite() and not state.reported and state.allowed_per_minute:
        parts.append(f"{short(state.allowed_per_minute)} rpm (by trying)")
    return "; ".join(parts)


def doing(progress: BatchProgress, quota: QuotaState | None, now: float) -> str:
    """What a batch waits for, in a few words; empty if it waits for nothing."""
    if progress.state is BatchState.PAUSED:
        return "paused"
    if progress.state is BatchState.PARKED:
        until = f" for {duration(progress.parked_until - now)}" if progress.parked_until else ""
        return f"parked{until}: the day's quota is used up"
    if progress.state.stopped:
        return str(progress.state) if progress.is_over else f"{progress.state}: ending what is left"
    return quota_words(quota, now) if quota is not None else ""


def quota_table(quotas: list[QuotaState]) -> FittingTable:
    """Quotas with their limits and what they are doing."""
    table = FittingTable("Quota", "Limits", "Found out", "After a 429", "In flight", "Today", "Now")
    now = time.time()
    for quota in quotas:
        table.add_row(
            quota.name,
            limits_words(quota.limits),
            learnt_words(quota),
            quota.policy.kind.replace("_", " "),
            count(quota.in_flight),
            count(quota.day_used),
            quota_words(quota, now) or "free",
        )
    return table
