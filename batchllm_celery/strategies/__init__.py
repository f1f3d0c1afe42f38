"""How calls are made: one strategy per provider or way of calling. SDKs are imported lazily."""

from batchllm_celery.strategies.base import (
    Answer,
    LLMCallStrategy,
    ProcessResources,
    as_completion,
)
from batchllm_celery.strategies.builtin import register_builtins
from batchllm_celery.strategies.callable import CallableStrategy
from batchllm_celery.strategies.escalation import EscalatingStrategy
from batchllm_celery.strategies.failures import (
    classify,
    classify_for,
    extract_token_usage,
    stamp_usage,
)
from batchllm_celery.strategies.gemini import GeminiResponse, GeminiStrategy
from batchllm_celery.strategies.gemini_cache import GeminiCachedStrategy
from batchllm_celery.strategies.model_strings import check_environment, spec_for_model
from batchllm_celery.strategies.openai_compatible import OpenAICompatibleStrategy
from batchllm_celery.strategies.pydantic_ai import PydanticAIStrategy
from batchllm_celery.strategies.registry import (
    Registration,
    Registry,
    StrategyCatalog,
    catalog,
    strategy,
)
from batchllm_celery.strategies.simulated import SimulatedStrategy
from batchllm_celery.strategies.structured import OutputSchema, StructuredStrategy

register_builtins(catalog)

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
    "Registration",
    "Registry",
    "SimulatedStrategy",
    "StrategyCatalog",
    "StructuredStrategy",
    "as_completion",
    "catalog",
    "check_environment",
    "classify",
    "classify_for",
    "extract_token_usage",
    "register_builtins",
    "spec_for_model",
    "stamp_usage",
    "strategy",
]
