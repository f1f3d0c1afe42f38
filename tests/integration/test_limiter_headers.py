"""Nothing is configured: the provider's headers tell the limits. Fleets in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit, SettledCall
from batchllm_celery.limiter.protocol import (
    AcquireReply,
    AcquireRequest,
    LimitReport,
    acquire_arguments,
)
from batchllm_celery.limiter.quota_state import read_state
from batchllm_celery.limiter.scripts import ACQUIRE, STATE
from batchllm_celery.limiter.settlements import limit_report
from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.models.rate_limits import LimitWindow, RateLimits
from batchllm_celery.simulation.config import RateLimitHeaders, SimulationConfig, Window
from tests.integration.test_limiter_model import Scripts
from tests.integration.virtual_fleet import run
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[VirtualRedis]:
    virtual = VirtualRedis(valkey.url)
    yield virtual
    virtual.client.close()


@pytest.mark.parametrize("form", list(RateLimitHeaders))
@pytest.mark.parametrize("window", [Window.BUCKET, Window.SLIDING])
def test_the_full_rate_from_the_first_answer_on(
    server: VirtualRedis, form: RateLimitHeaders, window: Window
) -> None:
    """Tokens limit here, requests don't: 97 % used, next to nothing refused."""
    settings: dict[str, Any] = {"rpm": 6_000, "tpm": 60_000, "output_tokens": 50}
    provider = SimulationConfig(latency=0.5, rate_limit_headers=form, window=window, **settings)
    seen = run(server, provider, Quota(name="q"), 40, processes=2, slots=15)
    assert seen.rate(2.5, 40, tokens=True) >= 0.97 * 1_000
    assert seen.refused_share(0, 40) <= 0.001


@pytest.mark.parametrize("form", list(RateLimitHeaders))
def test_limits_that_change_are_followed_within_seconds(
    server: VirtualRedis, form: RateLimitHeaders
) -> None:
    """Halved in mid-run, then others take 30 % until the provider's minute is used up."""
    provider = SimulationConfig(latency=0.5, rate_limit_headers=form, rpm=600)
    changes: list[tuple[float, dict[str, Any]]] = [
        (20.0, {"rpm": 300}),
        (60.0, {"rpm": 600, "other_users": 0.3}),
    ]
    seen = run(server, provider, Quota(name="q"), 260, processes=2, slots=15, changes=changes)
    assert 0.97 * 5 <= seen.rate(25, 60) <= 1.05 * 5
    assert 0.97 * 7 <= seen.rate(200, 260) <= 1.05 * 7
    assert seen.refused_share(0, 260) <= 0.001


def test_a_lower_limit_that_is_configured_stays(server: VirtualRedis) -> None:
    """A header is a ceiling: it raises nothing."""
    provider = SimulationConfig(latency=0.5, rate_limit_headers=RateLimitHeaders.OPENAI, rpm=6_000)
    quota = Quota(name="q", limits=QuotaLimits(requests_per_minute=600))
    seen = run(server, provider, quota, 20, processes=2, slots=15)
    assert 0.95 * 10 <= seen.rate(2, 20) <= 1.05 * 10


class Told(Scripts):
    """One process, and what it reports of headers."""

    def tell(self, wants: list[int], **report: Any) -> list[float]:
        self.sequence += 1
        request = {"sequence": self.sequence, "wanted": len(wants), "known_epoch": self.epoch}
        self.told = LimitReport(**{"binds": True, **report})
        return self._starts(wants, request)

    def _starts(self, wants: list[int], request: dict[str, Any]) -> list[float]:
        estimates = [Estimate(tokens, 0) for tokens in wants]
        arguments = acquire_arguments("a", AcquireRequest(**request), estimates, (), self.told)
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.keys, arguments))
        self.epoch = reply.epoch
        return [start_us * 1e-6 for start_us in reply.starts_us]


def test_what_is_left_lowers_what_may_start_and_never_raises_it(server: VirtualRedis) -> None:
    """Two left: nothing at once. All left: still the rate, and no burst beyond it."""
    scripts = Told(server, Quota(name="q"))
    assert len(scripts.tell([1] * 9, requests_per_second=10, remaining_requests=600)) <= 7
    server.now += 1.0
    assert scripts.tell([1], requests_per_second=10, remaining_requests=2) == []
    server.now += 1.0
    assert len(scripts.tell([1] * 99, requests_per_second=10, remaining_requests=10**6)) <= 7


def test_old_news_of_what_is_left_is_no_news(server: VirtualRedis) -> None:
    """A call of a minute was answered with what was left when it began."""
    scripts = Told(server, Quota(name="q"))
    scripts.tell([], requests_per_second=10, remaining_requests=600)
    server.now += 1.0
    assert scripts.tell([1], requests_per_second=10, remaining_requests=0, age_us=60e6)


def test_headers_of_another_model_are_shown_and_do_not_bind(server: VirtualRedis) -> None:
    """A quota named by hand may be drawn on by several models."""
    scripts = Told(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=6_000)))
    scripts.tell([], binds=False, requests_per_second=1, remaining_requests=0)
    server.now += 1.0
    assert len(scripts.tell([1] * 40, binds=False, requests_per_second=1)) >= 30
    raw = server.call(STATE, [scripts.keys[0], scripts.keys[2]])
    state = read_state("q", *raw)
    assert state.reported == {"requests": 60.0}
    assert not state.reported_binds


def test_windows_of_a_day_limit_no_minute() -> None:
    """Groq's requests are a day's, its tokens a minute's; a minute may reset in 61 seconds."""
    limits = RateLimits(
        requests=LimitWindow(limit=14_400, remaining=14_370, reset_seconds=179.56),
        tokens=LimitWindow(limit=6_000, remaining=5_000, reset_seconds=61.0),
        quota="groq:llama",
    )
    permit = Permit("groq:llama", 1, 10.0, 1, Estimate())
    call = SettledCall(permit, CallOutcome.SUCCEEDED, limits=limits)
    report = limit_report(call, now=10.5)
    assert (report.requests_per_second, report.requests_per_day) == (0, 14_400)
    assert (report.tokens_per_second, report.remaining_tokens) == (100, 5_000)
    assert report.binds
    assert report.age_us == pytest.approx(0.5e6)
