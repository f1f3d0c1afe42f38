"""`gemini:gemini-2.5-flash`: a model as a person names it, and whether its key is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.models import StrategySpec
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.structured import OutputSchema, Schema


@dataclass(frozen=True, slots=True)
class _Provider:
    default_model: str | None = None
    example: str = ""


_PROVIDERS = {
    "gemini": _Provider(example="gemini:gemini-2.5-flash"),
    "gemini-cached": _Provider(example="gemini-cached:gemini-2.5-flash"),
    "openai": _Provider(example="openai:gpt-4.1-mini"),
    "pydantic-ai": _Provider(example="pydantic-ai:gemini:gemini-2.5-flash"),
    "simulated": _Provider("simulated-flash", "simulated"),
}


def spec_for_model(
    model: str,
    *,
    system: str | None = None,
    schema: Schema | None = None,
    temperature: float | None = None,
    max_output_tokens: int | None = None,
    params: Mapping[str, Any] | None = None,
) -> StrategySpec:
    """The registered strategy that `--model` means, with its parameters.

    Args:
        model: `PROVIDER:NAME`; `simulated` alone will do.
        system: system text.
        schema: pydantic model or JSON Schema of the output.
        temperature: sampling temperature.
        max_output_tokens: where an answer is cut.
        params: further parameters of the provider's strategy (`cached_content`, `extra`, ...).

    Raises:
        UsageError: for an unknown provider, naming the known ones; a missing name; a bad schema.
    """
    name, _, rest = model.partition(":")
    provider = _PROVIDERS.get(name)
    if provider is None:
        raise UsageError(
            f"unknown model provider {name!r} in {model!r}; known are {', '.join(_PROVIDERS)} "
            f"(for example {_PROVIDERS['gemini'].example})"
        )
    chosen = rest or provider.default_model
    if not chosen:
        raise UsageError(f"model {model!r} names no model; write it like {provider.example}")
    given = {
        "model": chosen,
        "system": system,
        "schema": OutputSchema(schema).json_schema if schema is not None else None,
        "temperature": temperature,
        "max_output_tokens": max_output_tokens,
        **(params or {}),
    }
    return StrategySpec(
        name=name, params={key: value for key, value in given.items() if value is not None}
    )


def check_environment(spec: StrategySpec, settings: Settings) -> None:
    """Check that what a built-in strategy needs is set; calls nobody, imports nothing heavy.

    Raises:
        UsageError: naming the missing variable and where to get a key.
    """
    name = spec.name
    if name == "pydantic-ai":
        name = str(spec.params.get("model", "")).partition(":")[0]
    if name in ("gemini", "gemini-cached"):
        _check_gemini()
    elif name == "openai":
        _check_openai(settings)
    elif name == "simulated" and settings.simulated_url is None:
        raise UsageError(
            "BATCHLLM_SIMULATED_URL is not set: start a provider with `batchllm simulate` "
            "and set it to the URL it prints"
        )


def _check_gemini() -> None:
    if os.environ.get("GOOGLE_GENAI_USE_VERTEXAI", "").lower() in ("1", "true"):
        return
    if not (os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY")):
        raise UsageError(
            "GEMINI_API_KEY (or GOOGLE_API_KEY) is not set: "
            "get a key at https://aistudio.google.com/apikey"
        )


def _check_openai(settings: Settings) -> None:
    own_server = settings.openai_base_url or os.environ.get("OPENAI_BASE_URL")
    if not own_server and not os.environ.get("OPENAI_API_KEY"):
        raise UsageError(
            "OPENAI_API_KEY is not set: get a key at https://platform.openai.com/api-keys "
            "(or name your own server with --base-url)"
        )
