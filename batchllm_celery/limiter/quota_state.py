"""What Redis keeps of a quota, as records of the scripts, and as a person looks at it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from batchllm_celery.limiter.records import pack, size, unpack
from batchllm_celery.models import CooldownPolicy, Model, Quota, QuotaLimits

#: The number of refusals and overloads in a row that opens the breaker: one call at a time.
BREAKER_FAILURES = 5
#: Starts a second at which the search for an unknown rate begins.
START_RATE = 10
#: Starts a second that are no limit: of a quota that begins at full speed.
FULL_SPEED = 1_000_000


@dataclass(slots=True)
class QuotaSetup:
    """A quota's configuration as acquire.lua reads it; the defaults are those of a `Quota`.

    Rates are per second, 0: not limited. Times end in `_us` and are microseconds.
    """

    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    input_tokens_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    requests_per_day: int = 0
    max_concurrency: int = 0
    burst_us: int = 100_000
    """How much time's worth of a rate may start at once."""
    horizon_us: int = 2_000_000
    """How far ahead starts may lie; nothing starts for so long, and a second, after a restart."""
    adaptive: bool = True
    """Whether refusals cut the rate (CUBIC); else a slow start follows a cooldown."""
    max_cooldown_us: int = 600_000_000
    ramp_length: int = 0
    """Number of spacings of the slow start."""
    ramp_repeats: bool = False
    """Whether the last spacing stays for good."""
    full_speed: bool = False
    """No rate limits it, until the provider refuses a call."""
    adaptive_concurrency: bool = False
    """Whether the calls in flight are limited by the throughput that they bring."""

    @classmethod
    def of(cls, quota: Quota) -> QuotaSetup:
        """The setup of a quota."""
        limits, policy = quota.limits.finite(), quota.policy
        return cls(
            requests_per_second=limits.get("requests_per_minute", 0) / 60,
            tokens_per_second=limits.get("tokens_per_minute", 0) / 60,
            input_tokens_per_second=limits.get("input_tokens_per_minute", 0) / 60,
            output_tokens_per_second=limits.get("output_tokens_per_minute", 0) / 60,
            requests_per_day=int(limits.get("requests_per_day", 0)),
            max_concurrency=int(limits.get("max_concurrency", 0)),
            burst_us=int(quota.burst_seconds * 1e6),
            horizon_us=int(quota.horizon_seconds * 1e6),
            adaptive=policy.kind == "adaptive",
            max_cooldown_us=int(policy.max_cooldown * 1e6),
            ramp_length=len(policy.ramp),
            ramp_repeats=policy.ramp_repeats,
            full_speed=quota.limits.full_speed,
            adaptive_concurrency=quota.adaptive_concurrency,
        )


@dataclass(slots=True)
class LiveState:
    """What moves in a quota: read and written by each acquire request.

    Times end in `_us` and are microseconds: moments on Redis' clock since 1970, or durations. A
    newer version may add fields at the end: an older one reads those that it knows.
    """

    now_us: int = 0
    """The moment of the latest request."""
    epoch: int = 0
    """Grows with each cooldown, change of limits and loss of data: older reservations are void."""
    last_save_s: int = 0
    """What LASTSAVE said, seconds."""

    cooldown_until_us: int = 0
    consecutive_cooldowns: int = 0
    """Cooldowns in a row without a success."""
    failures_in_a_row: int = 0
    """Refusals and overloads without a success; `BREAKER_FAILURES` open the breaker."""
    probe_from_us: int = 0
    """When the open breaker lets the next call through."""
    ramp_position: int = -1
    """Starts of the slow start so far; -1: there was no cooldown yet."""
    ramp_previous_us: int = 0
    """The start before the next one of the slow start; at first the cooldown's end."""

    tat_requests_us: float = 0.0
    """GCRA's theoretical arrival time: when all started requests are paid for; 0: none was."""
    tat_tokens_us: float = 0.0
    tat_input_us: float = 0.0
    tat_output_us: float = 0.0

    day_used: int = 0
    day_resets_at_us: int = 0
    exhausted_until_us: int = 0
    """The provider said that the day is over: until then nothing starts."""

    pace: float = 0.0
    """What is allowed now: a share of known rates, else starts per second."""
    search_rate: float = START_RATE
    """Starts per second of a quota whose rate nobody knows, until its first cut; `FULL_SPEED`: no
    call was refused yet."""
    w_max: float = 0.0
    """CUBIC's W_max: the pace at the last cut; 0: there was none."""
    curve_time_s: float = 0.0
    """CUBIC's t: seconds since the last cut in which the rate held somebody up."""
    success_since_cut: bool = True
    """Only then another refusal cuts the pace again."""
    successes_since_cut: int = 0
    rate_limited_until_us: float = 0.0
    """Until then the rate holds somebody up; 0: it never did."""
    busy_since_us: int = 0
    """Since when starts have lain ahead of now without a gap."""
    slice_since_us: int = 0
    """Since when `slice_successes` are counted."""
    slice_successes: int = 0
    """Successes that are not in the quota's `history` yet."""

    in_flight: int = 0
    """Calls in flight and reservations of all processes."""
    lease_clock_us: int = 0
    """A clock that stands still while everybody is silent: leases end on it."""
    leases_checked_us: int = 0
    """When leases were checked, on that clock."""

    probing_process: str = ""
    """Who has the breaker's one call."""
    run_id: str = ""
    """Redis' own: another one means that it was restarted."""


@dataclass(slots=True)
class Congestion:
    """What is learnt of a provider's room: `steps/congestion.lua` explains it.

    The defaults are those of `adaptive_concurrency`. Counts are calls, moments and durations in
    `_us` microseconds, in `_s` seconds.
    """

    limit: float = 4.0
    """Calls in flight; infinity: no limit yet."""
    version: int = 0
    """Grows with each change of the limit; 0: new."""
    cut_version: int = -1
    """The first version after the last cut; -1, as of calls without a limit: there was none."""
    ceiling: float = math.inf
    """The limit that was refused; infinity: none was, or long ago."""
    floor: float = 1.0
    """What a burst of overloads leaves at least."""
    since_cut: int = 8
    """Successes since the last cut."""
    credit: float = 2.0
    """Overloads that are excused before the next cut."""
    mode: int = 1
    """1: raised on trial, -1: lowered on trial, 0: at rest, 2: coming back after a cut."""
    step: float = 2.0
    """Factor of the next trial."""
    extra: float = 0.0
    """How far beyond its rest the limit was raised, near the ceiling."""
    rest_up: int = 2
    """Windows of rest before a trial upwards, and how many of them are left."""
    left_up: int = 2
    rest_down: int = 2
    left_down: int = 2
    base_limit: float = 0.0
    """The window that the trial is compared with: limit, mean in flight, throughput (0: none yet),
    and the variance of its logarithm."""
    base_flight: float = 0.0
    base_rate: float = 0.0
    base_variance: float = 0.0
    calls: int = 0
    """The present window: successes, and sums over them."""
    seconds: float = 0.0
    tokens: float = 0.0
    flight: float = 0.0
    squares: float = 0.0
    peak: int = 0
    """The most in flight in it."""
    latency_s: float = 0.0
    """Mean latency of the latest successes."""
    success_us: int = 0
    """The last success and the last overload."""
    overload_us: int = 0
    pause_us: int = 0
    """How long nothing starts after overloads right after a cut."""
    paused_until_us: int = 0


@dataclass(slots=True)
class ReportedLimits:
    """The limits in the provider's headers, per second (requests a day per day); 0: not told."""

    at_us: int = 0
    """When the last ones came."""
    binds: bool = False
    """Whether they are about the model that this quota is named after."""
    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    input_per_second: float = 0.0
    output_per_second: float = 0.0
    requests_per_day: float = 0.0


def configure_arguments(quota: Quota, *, update: bool = False) -> list[str | bytes | int]:
    """ARGV of configure.lua."""
    lists = (quota.policy.cooldowns, quota.policy.ramp)
    cooldowns, ramp = (",".join(map(repr, seconds)) for seconds in lists)
    return [quota.model_dump_json(), int(update), pack(QuotaSetup.of(quota)), cooldowns, ramp]


class QuotaState(Model):
    """One moment of a quota. Moments are seconds since 1970 (Redis' clock), durations seconds.

    Args:
        allowed_per_minute: requests a minute now (after cuts); None: not limited. None too for
            quotas that are limited by tokens only: see `rate_factor`.
        configured: whether somebody has set it; else its rate is found by itself.
        rate_factor: share of the configured rates that is allowed now (1.0: all of it).
        owed_seconds: by dimension, how far starts lie ahead of now: 0 means room.
        waiting: processes with waiters.
        in_flight: calls in flight and reserved starts of all processes.
        epoch: grows with each cooldown, change of limits and loss of data.
        cooldown_remaining: seconds until the cooldown ends; 0 without one.
        consecutive: cooldowns in a row without a success.
        failures_in_a_row: refusals and overloads without a success.
        probing: the breaker is open: one call at a time.
        ramp_position: starts since the last cooldown; None when no slow start is under way.
        day_used: requests of the day; 0 where the day is not limited.
        day_resets_at: when the day's requests are counted from 0 again.
        exhausted_until: until when the day's quota is used up, as the provider said.
        adaptive_concurrency: whether the calls in flight are limited by their throughput.
        room: calls in flight that the provider seems to have room for; None: nothing is known.
        reported: the limits in the provider's headers, per minute, by dimension.
        reported_per_day: its limit of requests a day; None: none was told.
        reported_binds: whether they bind this quota, or are only shown: they are about a model that
            it is not named after.
    """

    name: str
    limits: QuotaLimits = QuotaLimits()
    policy: CooldownPolicy = CooldownPolicy()
    configured: bool = True
    allowed_per_minute: float | None = None
    rate_factor: float = 1.0
    owed_seconds: dict[str, float] = Field(default_factory=dict)
    waiting: int = 0
    in_flight: int = 0
    epoch: int = 0
    cooldown_remaining: float = 0.0
    consecutive: int = 0
    failures_in_a_row: int = 0
    probing: bool = False
    ramp_position: int | None = None
    day_used: int = 0
    day_resets_at: float | None = None
    exhausted_until: float | None = None
    adaptive_concurrency: bool = False
    room: int | None = None
    reported: dict[str, float] = Field(default_factory=dict)
    reported_per_day: float | None = None
    reported_binds: bool = False


def read_state(
    name: str,
    now_us: int,
    waiting: int,
    config: bytes,
    live: bytes,
    stored_setup: bytes,
    congestion: bytes = b"",
    headers: bytes = b"",
) -> QuotaState:
    """The state from what state.lua returns.

    Raises:
        ValueError: a part of it is no JSON or no record.
    """
    if stored_setup and len(stored_setup) < size(QuotaSetup):
        raise ValueError("the quota's setup is no record")
    quota = Quota.model_validate_json(config) if config else Quota(name=name)
    setup = QuotaSetup.of(quota)
    state = unpack(LiveState, live) if live else LiveState()
    room = _record(Congestion, congestion).limit
    reported = _record(ReportedLimits, headers)
    told = {
        "requests": (setup.requests_per_second, reported.requests_per_second),
        "tokens": (setup.tokens_per_second, reported.tokens_per_second),
        "input_tokens": (setup.input_tokens_per_second, reported.input_per_second),
        "output_tokens": (setup.output_tokens_per_second, reported.output_per_second),
    }
    tats_us = (
        state.tat_requests_us,
        state.tat_tokens_us,
        state.tat_input_us,
        state.tat_output_us,
    )
    dimensions = {
        name: (_lower(rate, by_header) if reported.binds else rate, tat_us)
        for (name, (rate, by_header)), tat_us in zip(told.items(), tats_us, strict=True)
    }
    known = any(rate for rate, _ in dimensions.values())
    pace = state.pace if live else float(known)
    per_second = dimensions["requests"][0] * pace if known else pace
    if per_second >= FULL_SPEED:
        per_second = 0.0
    in_ramp = not setup.adaptive and 0 <= state.ramp_position < setup.ramp_length
    values: dict[str, Any] = {
        "name": name,
        "limits": quota.limits,
        "policy": quota.policy,
        "configured": bool(config),
        "allowed_per_minute": per_second * 60 or None,
        "rate_factor": pace if known else 1.0,
        "owed_seconds": {
            label: max(tat_us - now_us, 0) / 1e6
            for label, (rate, tat_us) in dimensions.items()
            if rate or (label == "requests" and not known)
        },
        "waiting": waiting,
        "in_flight": state.in_flight,
        "epoch": state.epoch,
        "cooldown_remaining": max(state.cooldown_until_us - now_us, 0) / 1e6,
        "consecutive": state.consecutive_cooldowns,
        "failures_in_a_row": state.failures_in_a_row,
        "probing": state.failures_in_a_row >= BREAKER_FAILURES,
        "ramp_position": state.ramp_position if in_ramp else None,
        "day_used": state.day_used if now_us < state.day_resets_at_us else 0,
        "day_resets_at": state.day_resets_at_us / 1e6 or None,
        "exhausted_until": (
            state.exhausted_until_us / 1e6 if state.exhausted_until_us > now_us else None
        ),
        "adaptive_concurrency": quota.adaptive_concurrency,
        "room": int(room) if congestion and room < math.inf else None,
        "reported": {name: 60 * by_header for name, (_, by_header) in told.items() if by_header},
        "reported_per_day": reported.requests_per_day or None,
        "reported_binds": reported.binds,
    }
    return QuotaState(**values)


_R = TypeVar("_R")


def _record(record: type[_R], packed: bytes) -> _R:
    if packed and len(packed) != size(record):
        raise ValueError(f"the quota's {record.__name__} is no record")
    return unpack(record, packed) if packed else record()


def _lower(configured: float, reported: float) -> float:
    """The lower one of two rates; 0 is none."""
    return min(configured, reported) if configured and reported else configured or reported
