"""Whether, and when, another attempt follows: arithmetic only."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from tenacity import RetryCallState, wait_exponential

from batchllm_celery.models import FAILURE_POLICIES, Failure, RetryConfig

#: Seconds; a longer wait asked for by a provider is cut to this.
MAX_RETRY_AFTER = 600.0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """All that tenacity's wait functions look at."""

    attempt_number: int


def backoff(attempts: int, config: RetryConfig, draw: Callable[[], float] = random.random) -> float:
    """Seconds to wait after `attempts` failed attempts.

    `min(initial_wait * exponential_base ** (attempts - 1), max_wait)`, with jitter times a factor
    in [0.5, 1).
    """
    wait = wait_exponential(config.initial_wait, config.max_wait, config.exponential_base)
    seconds = float(wait(cast(RetryCallState, _Attempt(attempts))))
    return seconds * (0.5 + draw() / 2) if config.jitter else seconds


def delay_before_next(
    failure: Failure,
    attempts: int,
    config: RetryConfig,
    draw: Callable[[], float] = random.random,
    *,
    overloads: int = 0,
) -> float | None:
    """Seconds until the next attempt, None to give up.

    Args:
        failure: why the last attempt failed.
        attempts: attempts used up so far, the failed one included where its kind counts.
        config: the batch's retry rules.
        draw: source of jitter in [0, 1).
        overloads: overloads so far that used up no attempt; the wait grows with them as well.
    """
    policy = FAILURE_POLICIES[failure.kind]
    if not policy.retried or attempts >= config.max_attempts:
        return None
    if not policy.waits or not policy.uses_attempt:
        return 0.0  # a refusal waits in the limiter's cooldown, with the whole fleet
    asked = min(failure.retry_after or 0.0, MAX_RETRY_AFTER)
    return max(backoff(attempts + overloads, config, draw), asked)


def refused_too_often(refusals: int, limit: int, others_succeeded: bool) -> bool:
    """Whether a refused (429) item gives up.

    While nobody gets through, the quota is simply spent and everybody waits. An item that is
    refused again and again while others succeed is itself what the provider refuses (too large,
    say), and would cool the fleet down for ever.
    """
    return others_succeeded and refusals > limit
