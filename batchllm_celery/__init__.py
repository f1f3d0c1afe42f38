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
    from batchllm_celery.errors import (
        BatchLLMError,
        FailureKind,
        FrameworkTimeoutError,
        ProviderError,
        UsageError,
    )
    from batchllm_celery.models import (
        BatchResult,
        Completion,
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
        TokenUsage,
        WorkItemResult,
        current_item,
    )
    from batchllm_celery.producer import Batch, Producer
    from batchllm_celery.providers import (
        GeminiCachedStrategy,
        GeminiStrategy,
        OpenAICompatibleStrategy,
        PydanticAIStrategy,
    )
    from batchllm_celery.settings import Settings
    from batchllm_celery.strategies import (
        CallableStrategy,
        EscalatingStrategy,
        LLMCallStrategy,
        strategy,
    )
    from batchllm_celery.worker import install

__all__ = [
    # work and its outcome
    "LLMWorkItem",
    "Request",
    "NativeRequest",
    "WorkItemResult",
    "BatchResult",
    "TokenUsage",
    # strategies
    "strategy",
    "LLMCallStrategy",
    "current_item",
    "Completion",
    "RetryState",
    "GeminiStrategy",
    "GeminiCachedStrategy",
    "OpenAICompatibleStrategy",
    "PydanticAIStrategy",
    "CallableStrategy",
    "EscalatingStrategy",
    # a fleet
    "Producer",
    "Batch",
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
    # errors
    "BatchLLMError",
    "UsageError",
    "ProviderError",
    "Failure",
    "FailureKind",
    "FrameworkTimeoutError",
    "__version__",
]

#: Where each public name lives. Imported on first use, so that `import batchllm_celery` is quick
#: and a provider's SDK is loaded only by those who call it.
_HOMES = {
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
        "ProviderError",
        "UsageError",
    ),
    "models": (
        "BatchResult",
        "Completion",
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
        "TokenUsage",
        "WorkItemResult",
        "current_item",
    ),
    "producer": ("Batch", "Producer"),
    "providers": (
        "GeminiCachedStrategy",
        "GeminiStrategy",
        "OpenAICompatibleStrategy",
        "PydanticAIStrategy",
    ),
    "settings": ("Settings",),
    "strategies": ("CallableStrategy", "EscalatingStrategy", "LLMCallStrategy", "strategy"),
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
