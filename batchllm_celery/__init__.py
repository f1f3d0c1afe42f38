"""Distributed task-queue workers for LLM batches, on Celery and Redis.

from batchllm_celery import GeminiStrategy, LLMCallStrategy, Producer, strategy

@strategy("summarise", quota="gemini")
def summarise(model: str = "gemini-2.5-flash") -> LLMCallStrategy[str]:
    return GeminiStrategy(model=model)

batch = Producer().submit(["First text", "Second text"], strategy="summarise")
for result in batch.results():
    print(result.item_id, result.output)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchllm_celery._version import __version__

if TYPE_CHECKING:
    from batchllm_celery.compat.metrics import MetricsObserver
    from batchllm_celery.compat.processor import ParallelBatchProcessor
    from batchllm_celery.compat.rate_limits import (
        ExponentialBackoffStrategy,
        FixedDelayStrategy,
        RateLimitStrategy,
    )
    from batchllm_celery.connection import BrokenEntry
    from batchllm_celery.errors import (
        BatchLLMError,
        FailureKind,
        FrameworkTimeoutError,
        ItemFailedError,
        LedgerFullError,
        ProviderError,
        QuotaUnavailableError,
        UsageError,
    )
    from batchllm_celery.events import Event, Events, Listener
    from batchllm_celery.limiter import QuotaState
    from batchllm_celery.models import (
        BadRow,
        BatchProgress,
        BatchResult,
        BatchSpec,
        BatchState,
        Completion,
        CurrentItem,
        Failure,
        LLMWorkItem,
        NativeRequest,
        ProcessorConfig,
        Quota,
        QuotaLimits,
        RateLimitConfig,
        Request,
        RetryConfig,
        RetryState,
        StrategySpec,
        Timing,
        TokenUsage,
        WorkItemResult,
        current_item,
    )
    from batchllm_celery.producer import (
        Answered,
        AskOptions,
        AsyncBatch,
        AsyncItem,
        AsyncProducer,
        Batch,
        BlockingCallWarning,
        Delivered,
        Found,
        Item,
        Producer,
        Results,
        Row,
        RowWith,
        SubmitOptions,
        WorkerInfo,
    )
    from batchllm_celery.providers import (
        AnthropicStrategy,
        GeminiCachedStrategy,
        GeminiStrategy,
        OpenAICompatibleStrategy,
        PydanticAIStrategy,
    )
    from batchllm_celery.quotas import QuotaPermit, quota
    from batchllm_celery.settings import Settings
    from batchllm_celery.strategies import (
        CallableStrategy,
        EscalatingStrategy,
        LLMCallStrategy,
        RegisteredStrategy,
        TypedStrategy,
        strategy,
    )
    from batchllm_celery.worker import install

__all__ = [
    # work and its outcome
    "LLMWorkItem",
    "Request",
    "NativeRequest",
    "BadRow",
    "WorkItemResult",
    "BatchResult",
    "Timing",
    "TokenUsage",
    # strategies
    "strategy",
    "current_item",
    "CurrentItem",
    "RegisteredStrategy",
    "TypedStrategy",
    "StrategySpec",
    "LLMCallStrategy",
    "Completion",
    "RetryState",
    "AnthropicStrategy",
    "GeminiStrategy",
    "GeminiCachedStrategy",
    "OpenAICompatibleStrategy",
    "PydanticAIStrategy",
    "CallableStrategy",
    "EscalatingStrategy",
    # a fleet
    "Producer",
    "AsyncProducer",
    "SubmitOptions",
    "Answered",
    "Found",
    "AskOptions",
    "Item",
    "AsyncItem",
    "Row",
    "RowWith",
    "Batch",
    "AsyncBatch",
    "Results",
    "Delivered",
    "BatchSpec",
    "BatchProgress",
    "BatchState",
    "QuotaState",
    "WorkerInfo",
    "BrokenEntry",
    "Events",
    "Event",
    "Listener",
    "install",
    "Settings",
    # one process
    "ParallelBatchProcessor",
    "MetricsObserver",
    # configuration
    "ProcessorConfig",
    "RetryConfig",
    "RateLimitConfig",
    "RateLimitStrategy",
    "ExponentialBackoffStrategy",
    "FixedDelayStrategy",
    "Quota",
    "QuotaLimits",
    # code that makes its own calls
    "quota",
    "QuotaPermit",
    # errors
    "BatchLLMError",
    "UsageError",
    "ProviderError",
    "Failure",
    "FailureKind",
    "FrameworkTimeoutError",
    "QuotaUnavailableError",
    "ItemFailedError",
    "LedgerFullError",
    "BlockingCallWarning",
    "__version__",
]

#: Where each public name lives. Imported on first use, so that `import batchllm_celery` is quick
#: and a provider's SDK is loaded only by those who call it.
_HOMES = {
    "connection": ("BrokenEntry",),
    "events": ("Event", "Events", "Listener"),
    "limiter": ("QuotaState",),
    "compat.metrics": ("MetricsObserver",),
    "compat.processor": ("ParallelBatchProcessor",),
    "compat.rate_limits": (
        "ExponentialBackoffStrategy",
        "FixedDelayStrategy",
        "RateLimitStrategy",
    ),
    "errors": (
        "BatchLLMError",
        "FailureKind",
        "FrameworkTimeoutError",
        "ItemFailedError",
        "LedgerFullError",
        "ProviderError",
        "QuotaUnavailableError",
        "UsageError",
    ),
    "models": (
        "BadRow",
        "BatchProgress",
        "BatchResult",
        "BatchSpec",
        "BatchState",
        "Completion",
        "CurrentItem",
        "Failure",
        "LLMWorkItem",
        "NativeRequest",
        "ProcessorConfig",
        "Quota",
        "QuotaLimits",
        "RateLimitConfig",
        "Request",
        "RetryConfig",
        "RetryState",
        "StrategySpec",
        "Timing",
        "TokenUsage",
        "WorkItemResult",
        "current_item",
    ),
    "producer": (
        "Answered",
        "Found",
        "AskOptions",
        "AsyncItem",
        "Item",
        "AsyncBatch",
        "AsyncProducer",
        "Batch",
        "BlockingCallWarning",
        "Delivered",
        "Producer",
        "Results",
        "Row",
        "RowWith",
        "SubmitOptions",
        "WorkerInfo",
    ),
    "providers": (
        "AnthropicStrategy",
        "GeminiCachedStrategy",
        "GeminiStrategy",
        "OpenAICompatibleStrategy",
        "PydanticAIStrategy",
    ),
    "quotas": ("QuotaPermit", "quota"),
    "settings": ("Settings",),
    "strategies": (
        "CallableStrategy",
        "EscalatingStrategy",
        "LLMCallStrategy",
        "RegisteredStrategy",
        "TypedStrategy",
        "strategy",
    ),
    "worker": ("install",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "app":  # what `celery -A batchllm_celery` looks for
        from batchllm_celery.worker.tasks import worker_app

        value: Any = worker_app()
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
