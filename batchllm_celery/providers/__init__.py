"""The strategies that every process knows by name. Their parameters are what a message may say,
so none of them is a URL, a key or code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.gemini import GeminiStrategy
from batchllm_celery.strategies.gemini_cache import GeminiCachedStrategy
from batchllm_celery.strategies.openai_compatible import OpenAICompatibleStrategy
from batchllm_celery.strategies.pydantic_ai import PydanticAIModelStrategy
from batchllm_celery.strategies.registry import Registration, StrategyCatalog
from batchllm_celery.strategies.simulated import SimulatedStrategy


def gemini(
    model: str,
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    thinking_budget: int | None = None,
) -> LLMCallStrategy[Any]:
    """`GeminiStrategy` by its parameters."""
    return GeminiStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        thinking_budget=thinking_budget,
    )


def gemini_cached(
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
    """`GeminiCachedStrategy` by its parameters."""
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


def openai(
    model: str,
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> LLMCallStrategy[Any]:
    """`OpenAICompatibleStrategy` by its parameters; the server is the process's own setting."""
    return OpenAICompatibleStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        extra=extra,
    )


def simulated(
    model: str = "simulated-flash",
    *,
    system: str | None = None,
    schema: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    thinking_budget: int | None = None,
) -> LLMCallStrategy[Any]:
    """`SimulatedStrategy` by its parameters."""
    return SimulatedStrategy(
        model,
        system=system,
        schema=schema,
        temperature=temperature,
        max_output_tokens=max_output_tokens,
        thinking_budget=thinking_budget,
    )


def register_builtins(catalog: StrategyCatalog) -> None:
    """Add the built-in names."""
    for registration in (
        Registration("gemini", gemini, provider="gemini"),
        Registration("gemini-cached", gemini_cached, provider="gemini"),
        Registration("openai", openai, provider="openai"),
        # Its `model` names its provider: pydantic-ai:gemini:NAME draws on gemini:NAME's quota.
        Registration("pydantic-ai", PydanticAIModelStrategy, provider=""),
        Registration("simulated", simulated, provider="simulated"),
    ):
        catalog.register(registration)
