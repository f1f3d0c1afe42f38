"""What a simulated provider is like."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from batchllm_celery.models import Model

Share = Annotated[float, Field(ge=0, le=1)]
Limit = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]


class Window(StrEnum):
    """How a limit per minute is counted."""

    BUCKET = "bucket"
    """A continuously refilled bucket of `bucket_seconds`' worth."""
    FIXED = "fixed"
    """Anything up to the limit within each window, counted from zero."""
    SLIDING = "sliding"
    """What was charged in the last window, at every moment."""


class RetryHint(StrEnum):
    """How a 429 says when to come back."""

    RETRY_INFO = "retry-info"
    """Fractions of a second: Gemini's RetryInfo, OpenAI's `retry-after-ms`."""
    RETRY_AFTER = "retry-after"
    """The `Retry-After` header, in whole seconds."""
    NONE = "none"


class RateLimitHeaders(StrEnum):
    """Headers in which each answer tells the limits."""

    OPENAI = "openai"
    """`x-ratelimit-limit-requests` and its like, as OpenAI, Azure and Groq send them."""
    ANTHROPIC = "anthropic"
    """`anthropic-ratelimit-requests-limit` and its like; resets are dates in whole seconds."""


class SimulationConfig(Model):
    """A simulated provider, with its limits, its speed and its faults.

    Every decision follows from `seed`, the prompt and how many times that prompt was admitted
    before, so a run can be repeated whatever the order in which its calls arrive.

    Args:
        host, port: where it listens; port 0 picks a free one.
        latency: mean seconds of an answer.
        jitter: seconds, uniformly more or less.
        latency_tail: sigma of a lognormal factor with mean 1; 0 for none, 1 for a long tail.
        rpm, tpm, input_tpm, output_tpm: per minute; `tpm` counts input + output. All tokens are
            known, and charged, when a call arrives. A refused call is charged nothing.
        rpd: requests a day; the day begins with the server (or its reset).
        max_concurrency: calls in flight.
        window: how limits per minute are counted.
        bucket_seconds: seconds' worth of a minute's limit that may come at once (`bucket`); None:
            1, and 60 with `rate_limit_headers`, as the providers have it that send them.
        window_seconds: length of a "minute" (`fixed`, `sliding`), for tests in a hurry.
        day_seconds: length of a "day".
        retry_hint: what a 429 says.
        rate_limit_headers: how each answer tells the limits.
        other_users: share of each limit per minute that others take, all the time.
        refuse_beyond: calls in flight beyond which it has no room and answers `overload_status`.
        overload_status: what a server without room answers.
        decode_slots: calls that decode together; the others queue. Each slows the others down.
        decode_queue: calls that may queue, beyond which it has no room; None: any number.
        decode_seconds: a token's time, of a call that decodes alone.
        decode_slowdown: share of it that each other call in a slot adds.
        input_seconds, output_seconds: seconds that 1,000 tokens add to the latency; with
            `decode_slots` the output has its own time.
        burst_every, burst_seconds, burst_share: at the end of each `burst_every` seconds (0:
            never) there is for `burst_seconds` no room for this share of calls.
        billing_exhausted: whether every call is refused for want of money.
        error_rate: share of calls that fail with one of `error_statuses`.
        error_statuses: HTTP statuses, equally likely.
        drop_rate: share of calls whose connection is closed without an answer.
        bad_output_rate: share of malformed JSON where JSON was asked for.
        block_rate: share of prompts that the safety filter blocks, at every attempt.
        truncated_rate: share of answers cut as if the output limit was reached.
        output_tokens: tokens of every answer; None: as the answer's text is long.
        output_tail: sigma of a lognormal factor of that with mean 1; 0 for none.
        thoughts_tokens: thinking tokens of every answer, counted apart.
        min_cache_tokens: the smallest content that a context cache takes.
        missing_cache_status: what an expired or unknown cache gives; Gemini says 403.
        models: the models that exist; None: all.
        api_key: the only key accepted; None: any, or none at all.
        seed: another seed, other decisions.
        keep_calls: how many of the latest calls `calls` remembers.
        strict: whether unknown fields, wrong roles and wrong media types are a 400, as with the
            real providers.
        keep_bodies: whether each call in `calls` keeps its whole body.
        log_file: one JSON line for each arrival, written at once; see `Journal`.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    latency: float = Field(default=0.0, ge=0)
    jitter: float = Field(default=0.0, ge=0)
    latency_tail: float = Field(default=0.0, ge=0, le=3)
    rpm: Limit = None
    tpm: Limit = None
    input_tpm: Limit = None
    output_tpm: Limit = None
    rpd: Limit = None
    max_concurrency: int | None = Field(default=None, gt=0)
    window: Window = Window.BUCKET
    bucket_seconds: float | None = Field(default=None, gt=0)
    window_seconds: float = Field(default=60.0, gt=0)
    day_seconds: float = Field(default=86_400.0, gt=0)
    retry_hint: RetryHint = RetryHint.RETRY_INFO
    rate_limit_headers: RateLimitHeaders | None = None
    other_users: float = Field(default=0.0, ge=0, lt=1)
    refuse_beyond: int | None = Field(default=None, gt=0)
    overload_status: Literal[503, 529] = 503
    decode_slots: int | None = Field(default=None, gt=0)
    decode_queue: int | None = Field(default=None, ge=0)
    decode_seconds: float = Field(default=0.02, gt=0)
    decode_slowdown: float = Field(default=0.0125, ge=0)
    input_seconds: float = Field(default=0.0, ge=0)
    output_seconds: float = Field(default=0.0, ge=0)
    burst_every: float = Field(default=0.0, ge=0)
    burst_seconds: float = Field(default=20.0, gt=0)
    burst_share: Share = 0.5
    billing_exhausted: bool = False
    error_rate: Share = 0.0
    error_statuses: tuple[Literal[400, 401, 403, 404, 408, 500, 502, 503, 504, 529], ...] = (
        500,
        503,
    )
    drop_rate: Share = 0.0
    bad_output_rate: Share = 0.0
    block_rate: Share = 0.0
    truncated_rate: Share = 0.0
    output_tokens: int | None = Field(default=None, gt=0)
    output_tail: float = Field(default=0.0, ge=0, le=3)
    thoughts_tokens: int = Field(default=0, ge=0)
    min_cache_tokens: int = Field(default=0, ge=0)
    missing_cache_status: Literal[403, 404] = 403
    models: tuple[str, ...] | None = None
    api_key: str | None = None
    seed: int = 0
    keep_calls: int = Field(default=100_000, ge=0)
    strict: bool = True
    keep_bodies: bool = False
    log_file: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.error_statuses:
            raise ValueError("error_statuses must name at least one status")
        return self

    def changed(self, **changes: object) -> SimulationConfig:
        """This configuration with some fields changed, checked again.

        Raises:
            ValueError: for an unknown field or a bad value.
        """
        return SimulationConfig.model_validate({**self.model_dump(), **changes})
