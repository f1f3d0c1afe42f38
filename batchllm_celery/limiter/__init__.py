"""The fleet-wide limiter: start times for provider calls, decided in Redis on Redis' clock."""

import importlib
from typing import TYPE_CHECKING, Any

from batchllm_celery.limiter.estimator import Estimator
from batchllm_celery.limiter.limiter import Limiter
from batchllm_celery.limiter.permit import (
    CallOutcome,
    Estimate,
    Permit,
)
from batchllm_celery.limiter.quota_state import QuotaState

if TYPE_CHECKING:
    from batchllm_celery.compat.rate_limits import (
        ExponentialBackoffStrategy,
        FixedDelayStrategy,
        RateLimitStrategy,
        policy_from,
    )

__all__ = [
    "CallOutcome",
    "Estimate",
    "Estimator",
    "ExponentialBackoffStrategy",
    "FixedDelayStrategy",
    "Limiter",
    "Permit",
    "QuotaState",
    "RateLimitStrategy",
    "policy_from",
]

#: batch-llm's, which is in `compat`; the names here are a documented path.
_COMPAT = (
    "ExponentialBackoffStrategy",
    "FixedDelayStrategy",
    "RateLimitStrategy",
    "policy_from",
)


def __getattr__(name: str) -> Any:
    if name not in _COMPAT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("batchllm_celery.compat.rate_limits"), name)
