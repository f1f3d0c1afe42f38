"""The fleet-wide limiter: start times for provider calls, decided in Redis on Redis' clock."""

from batchllm_celery.limiter.estimator import Estimator
from batchllm_celery.limiter.limiter import Limiter
from batchllm_celery.limiter.permit import (
    CallOutcome,
    Estimate,
    Permit,
    ReportedLimit,
    ReportedLimits,
)
from batchllm_celery.limiter.policies import (
    ExponentialBackoffStrategy,
    FixedDelayStrategy,
    RateLimitStrategy,
    policy_from,
)
from batchllm_celery.limiter.quota_state import QuotaState

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
    "ReportedLimit",
    "ReportedLimits",
    "policy_from",
]
