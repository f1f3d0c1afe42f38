"""Backoff and giving up: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_celery.errors import FailureKind
from batchllm_celery.execution.retry import (
    MAX_RETRY_AFTER,
    backoff,
    delay_before_next,
    refused_too_often,
)
from batchllm_celery.models import FAILURE_POLICIES, Failure, RetryConfig

STEADY = RetryConfig(jitter=False)


def failure(kind: FailureKind, retry_after: float | None = None) -> Failure:
    return Failure(kind, "Error: no", retry_after)


def test_backoff_doubles_from_the_initial_wait_and_stops_at_the_maximum() -> None:
    """batch-llm's defaults wait 1, 2, 4, ... seconds, and never more than 60."""
    waits = [backoff(n, STEADY) for n in (1, 2, 3, 6, 7, 100_000)]
    assert waits == [1, 2, 4, 32, 60, 60]


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_jitter_takes_between_half_and_all_of_the_wait(attempts: int, drawn: float) -> None:
    """With jitter the wait lies in [0.5, 1) of the one without."""
    full = backoff(attempts, STEADY)
    assert 0.5 * full <= backoff(attempts, RetryConfig(), lambda: drawn) <= full


def test_the_last_attempt_is_not_followed_by_another() -> None:
    """After max_attempts failures the item gives up."""
    kind = FailureKind.CONNECTION
    assert delay_before_next(failure(kind), 2, STEADY) == 2
    assert delay_before_next(failure(kind), 3, STEADY) is None


@pytest.mark.parametrize("kind", [k for k, p in FAILURE_POLICIES.items() if not p.retried])
def test_a_kind_that_another_try_cannot_mend_is_final(kind: FailureKind) -> None:
    """Kinds whose policy says so are never retried."""
    assert delay_before_next(failure(kind), 1, STEADY) is None


def test_a_validation_failure_is_retried_at_once() -> None:
    """The model answered: there is nothing to wait for."""
    assert delay_before_next(failure(FailureKind.VALIDATION), 1, STEADY) == 0


def test_a_refusal_waits_in_the_limiter_not_here() -> None:
    """A 429 cools the whole fleet down; the item adds no wait of its own."""
    assert delay_before_next(failure(FailureKind.RATE_LIMITED, 30), 0, STEADY) == 0


def test_a_server_that_asks_for_time_gets_it_within_reason() -> None:
    """Retry-After is a floor under the backoff, clamped to a maximum."""
    kind = FailureKind.OVERLOADED
    assert delay_before_next(failure(kind, 17), 1, STEADY) == 17
    assert delay_before_next(failure(kind, 0.1), 1, STEADY) == 1
    assert delay_before_next(failure(kind, 86_400), 1, STEADY) == MAX_RETRY_AFTER


@pytest.mark.parametrize(
    ("refusals", "others", "gives_up"),
    [(20, True, False), (21, True, True), (10_000, False, False)],
)
def test_an_item_gives_up_on_429s_only_while_others_succeed(
    refusals: int, others: bool, gives_up: bool
) -> None:
    """When nobody gets through the quota is spent, and waiting is right."""
    assert refused_too_often(refusals, 20, others) is gives_up
