"""Values that cross processes: items, results, configuration, quotas. JSON only, never pickle."""

from batchllm_celery.models.base import SCHEMA_VERSION, Model
from batchllm_celery.models.batch import BatchProgress, BatchSpec, BatchState
from batchllm_celery.models.config import (
    MAX_OVERLOADS,
    ProcessorConfig,
    RateLimitConfig,
    RetryConfig,
)
from batchllm_celery.models.current_item import CurrentItem, current_item
from batchllm_celery.models.failure import (
    FAILURE_POLICIES,
    Failure,
    FailurePolicy,
)
from batchllm_celery.models.item import (
    BadRow,
    BatchResult,
    Completion,
    LLMWorkItem,
    StrategySpec,
    TContext,
    Timing,
    TInput,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.models.quota import CooldownPolicy, Quota, QuotaLimits
from batchllm_celery.models.rate_limits import LimitWindow, RateLimits
from batchllm_celery.models.reply import RawReply
from batchllm_celery.models.request import NativeRequest, Prompt, Request
from batchllm_celery.models.retry_state import RetryState
from batchllm_celery.models.usage import NO_TOKENS, TokenUsage

__all__ = [
    "FAILURE_POLICIES",
    "MAX_OVERLOADS",
    "NO_TOKENS",
    "SCHEMA_VERSION",
    "BadRow",
    "BatchProgress",
    "BatchResult",
    "BatchSpec",
    "BatchState",
    "Completion",
    "CooldownPolicy",
    "CurrentItem",
    "Failure",
    "FailurePolicy",
    "LLMWorkItem",
    "LimitWindow",
    "Model",
    "NativeRequest",
    "ProcessorConfig",
    "Prompt",
    "Quota",
    "QuotaLimits",
    "RateLimitConfig",
    "RateLimits",
    "RawReply",
    "Request",
    "RetryConfig",
    "RetryState",
    "StrategySpec",
    "TContext",
    "TInput",
    "TOutput",
    "Timing",
    "TokenUsage",
    "WorkItemResult",
    "current_item",
]
