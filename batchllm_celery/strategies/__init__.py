"""What a strategy is, how it gets its name, and what its failures mean. No provider is named here:
those are in `providers`."""

import importlib
from typing import Any

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
from batchllm_celery.strategies.registry import (
    Registration,
    Registry,
    StrategyCatalog,
    catalog,
    strategy,
)
from batchllm_celery.strategies.structured import OutputSchema, StructuredStrategy

__all__ = [
    "Answer",
    "CallableStrategy",
    "EscalatingStrategy",
    "LLMCallStrategy",
    "OutputSchema",
    "ProcessResources",
    "Registration",
    "Registry",
    "StrategyCatalog",
    "StructuredStrategy",
    "as_completion",
    "catalog",
    "classify",
    "classify_for",
    "extract_token_usage",
    "stamp_usage",
    "strategy",
]


def __getattr__(name: str) -> Any:
    """Providers' strategies under their former path (`strategies.GeminiCachedStrategy`)."""
    if not name.endswith(("Strategy", "Response")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("batchllm_celery.providers"), name)
