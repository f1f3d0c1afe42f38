"""The providers: a client, a strategy and what else each has. None knows another.

The strategies that every process knows by name are registered here. A provider is imported when
the first of its strategies is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.registry import Registration, StrategyCatalog

if TYPE_CHECKING:
    from batchllm_celery.providers.gemini import (
        GeminiCachedStrategy,
        GeminiResponse,
        GeminiStrategy,
    )
    from batchllm_celery.providers.openai import OpenAICompatibleStrategy
    from batchllm_celery.providers.pydantic_ai import PydanticAIStrategy
    from batchllm_celery.providers.simulated import SimulatedStrategy

__all__ = [
    "GeminiCachedStrategy",
    "GeminiResponse",
    "GeminiStrategy",
    "OpenAICompatibleStrategy",
    "PydanticAIStrategy",
    "SimulatedStrategy",
    "register_builtins",
]

#: Class -> the module that it is imported from at its first use.
_HOMES = {
    "GeminiCachedStrategy": "gemini",
    "GeminiResponse": "gemini",
    "GeminiStrategy": "gemini",
    "OpenAICompatibleStrategy": "openai",
    "PydanticAIStrategy": "pydantic_ai",
    "SimulatedStrategy": "simulated",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


# -- factories by name. Their parameters are what a message may say: no URL, no key, no code.


def _gemini(
    model: str,
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    thinking_budget: int | None = None,
) -> LLMCallStrategy[Any]:
    from batchllm_celery.providers.gemini import GeminiStrategy

    return GeminiStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        thinking_budget=thinking_budget,
    )


def _gemini_cached(
    model: str,
    *,
    cached_content: str | list[str] | None = None,
    cache_ttl_seconds: float = 3600,
    cache_renewal_buffer_seconds: float = 300,
    cache_tags: Mapping[str, Any] | None = None,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    thinking_budget: int | None = None,
) -> LLMCallStrategy[Any]:
    from batchllm_celery.providers.gemini import GeminiCachedStrategy

    return GeminiCachedStrategy(
        model,
        cached_content=cached_content,
        cache_ttl_seconds=cache_ttl_seconds,
        cache_renewal_buffer_seconds=cache_renewal_buffer_seconds,
        cache_tags=cache_tags,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        thinking_budget=thinking_budget,
    )


def _openai(
    model: str,
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> LLMCallStrategy[Any]:
    from batchllm_celery.providers.openai import OpenAICompatibleStrategy

    return OpenAICompatibleStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        extra=extra,
    )


def _simulated(
    model: str = "simulated-flash",
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    thinking_budget: int | None = None,
) -> LLMCallStrategy[Any]:
    from batchllm_celery.providers.simulated import SimulatedStrategy

    return SimulatedStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        thinking_budget=thinking_budget,
    )


def _pydantic_ai(
    model: str,
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
) -> LLMCallStrategy[Any]:
    from batchllm_celery.providers.pydantic_ai import PydanticAIModelStrategy

    return PydanticAIModelStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
    )


def register_builtins(catalog: StrategyCatalog) -> None:
    """Add the built-in names."""
    for registration in (
        Registration("gemini", _gemini, provider="gemini"),
        Registration("gemini-cached", _gemini_cached, provider="gemini"),
        Registration("openai", _openai, provider="openai"),
        # Its `model` names its provider: pydantic-ai:gemini:NAME draws on gemini:NAME's quota.
        Registration("pydantic-ai", _pydantic_ai, provider=""),
        Registration("simulated", _simulated, provider="simulated"),
    ):
        catalog.register(registration)
