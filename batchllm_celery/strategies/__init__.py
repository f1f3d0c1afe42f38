"""What a strategy is, how it gets its name, and what its failures mean. No provider is named here:
those are in `providers`."""

import importlib
from typing import TYPE_CHECKING, Any

from batchllm_celery.strategies.base import (
    Answer,
    LLMCallStrategy,
    ProcessResources,
    as_completion,
)
from batchllm_celery.strategies.callable import CallableStrategy
from batchllm_celery.strategies.escalation import EscalatingStrategy
from batchllm_celery.strategies.failures import (
    classify,
    classify_for,
    extract_token_usage,
    stamp_usage,
)
from batchllm_celery.strategies.registered import RegisteredStrategy, TypedStrategy
from batchllm_celery.strategies.registry import (
    Registration,
    Registry,
    StrategyCatalog,
    catalog,
    strategy,
)
from batchllm_celery.strategies.structured import OutputSchema, StructuredStrategy

if TYPE_CHECKING:
    from batchllm_celery.providers import (
        GeminiCachedStrategy,
        GeminiResponse,
        GeminiStrategy,
        OpenAICompatibleStrategy,
        PydanticAIStrategy,
        SimulatedStrategy,
    )

__all__ = [
    "Answer",
    "CallableStrategy",
    "EscalatingStrategy",
    "GeminiCachedStrategy",
    "GeminiResponse",
    "GeminiStrategy",
    "LLMCallStrategy",
    "OpenAICompatibleStrategy",
    "OutputSchema",
    "ProcessResources",
    "PydanticAIStrategy",
    "RegisteredStrategy",
    "Registration",
    "Registry",
    "SimulatedStrategy",
    "StrategyCatalog",
    "StructuredStrategy",
    "TypedStrategy",
    "as_completion",
    "catalog",
    "classify",
    "classify_for",
    "extract_token_usage",
    "stamp_usage",
    "strategy",
]


#: Providers' classes, which are in `providers`; the names here are a documented path.
_PROVIDERS = (
    "GeminiCachedStrategy",
    "GeminiResponse",
    "GeminiStrategy",
    "OpenAICompatibleStrategy",
    "PydanticAIStrategy",
    "SimulatedStrategy",
)


def __getattr__(name: str) -> Any:
    if name not in _PROVIDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("batchllm_celery.providers"), name)
