"""The providers: a client, a strategy and what else each has. None knows another.

The strategies that every process knows by name are registered here. A provider is imported when
the first of its strategies is built.
"""

from __future__ import annotations

import importlib
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any

from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.registry import Factory, Registration

if TYPE_CHECKING:
    from batchllm_celery.providers.anthropic import AnthropicStrategy
    from batchllm_celery.providers.gemini import (
        GeminiCachedStrategy,
        GeminiResponse,
        GeminiStrategy,
    )
    from batchllm_celery.providers.openai import OpenAICompatibleStrategy
    from batchllm_celery.providers.pydantic_ai import PydanticAIStrategy
    from batchllm_celery.providers.simulated import SimulatedStrategy

__all__ = [
    "AnthropicStrategy",
    "GeminiCachedStrategy",
    "GeminiResponse",
    "GeminiStrategy",
    "OpenAICompatibleStrategy",
    "PydanticAIStrategy",
    "SimulatedStrategy",
    "builtin_registrations",
]

#: Class -> the module that it is imported from at its first use.
_HOMES = {
    "AnthropicStrategy": "anthropic",
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


# -- strategies by name

_OPTIONS = ("system", "schema", "temperature", "max_output_tokens")
_REQUEST_OPTIONS = (*_OPTIONS, "allow_dropping")
_CACHE_OPTIONS = (
    "cached_content",
    "cache_ttl_seconds",
    "cache_renewal_buffer_seconds",
    "cache_tags",
)


def _factory(path: str, *options: str, model: str | None = None) -> Factory:
    """A factory that imports its strategy class when it is called.

    Args:
        path: MODULE:CLASS in this package.
        options: the parameters that a message may give beside `model`: no URL, no key, no code.
        model: the default model; None: there is none.
    """
    module, _, name = path.partition(":")
    defaults = {} if model is None else {"model": model}

    def build(**params: Any) -> LLMCallStrategy[Any]:
        strategy_class: Any = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        built: LLMCallStrategy[Any] = strategy_class(**{**defaults, **params})
        return built

    factory: Any = build
    factory.__qualname__ = name  # an error message names it
    factory.__signature__ = Signature(
        [
            Parameter("model", Parameter.KEYWORD_ONLY, default=model or Parameter.empty),
            *(Parameter(option, Parameter.KEYWORD_ONLY, default=None) for option in options),
        ]
    )
    return build


def builtin_registrations() -> tuple[Registration, ...]:
    """The built-in names."""
    thinking = (*_REQUEST_OPTIONS, "thinking_budget")
    gemini = _factory("gemini:GeminiStrategy", *thinking)
    cached = _factory("gemini:GeminiCachedStrategy", *_CACHE_OPTIONS, *_OPTIONS, "thinking_budget")
    openai = _factory("openai:OpenAICompatibleStrategy", *_REQUEST_OPTIONS, "extra", "api")
    claude = _factory(
        "anthropic:AnthropicStrategy", *_REQUEST_OPTIONS, "thinking_budget", "cache", "extra"
    )
    agent = _factory("pydantic_ai:PydanticAIModelStrategy", *_OPTIONS)
    simulated = _factory("simulated:SimulatedStrategy", *thinking, model="simulated-flash")
    return (
        Registration("gemini", gemini, provider="gemini"),
        Registration("gemini-cached", cached, provider="gemini"),
        Registration("openai", openai, provider="openai"),
        Registration("anthropic", claude, provider="anthropic"),
        # Its `model` names its provider: pydantic-ai:gemini:NAME draws on gemini:NAME's quota.
        Registration("pydantic-ai", agent, provider=""),
        Registration("simulated", simulated, provider="simulated"),
    )
