"""What the runner must know of a prompt of any form before it is called."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from batchllm_celery.dialects.estimates import tokens_of_prompt
from batchllm_celery.models import NativeRequest, Prompt, Request
from batchllm_celery.strategies.base import LLMCallStrategy

#: Bytes of parts from which on their tokens are counted in a thread: pages and seconds take a look
#: at all of them.
LARGE_BYTES = 256 * 1024

#: Where native bodies hold the limit of the answer.
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


async def input_tokens(prompt: Prompt, strategy: LLMCallStrategy[Any]) -> int:
    """About how many input tokens a prompt has, by the rules of the strategy's provider."""
    native = isinstance(prompt, NativeRequest)
    dialect = prompt.dialect if isinstance(prompt, NativeRequest) else strategy.dialect
    model = (strategy.model_name or "").partition(":")[2]
    if native or any(len(data) >= LARGE_BYTES for data in _parts(prompt)):
        return await asyncio.to_thread(tokens_of_prompt, prompt, dialect, model=model)
    return tokens_of_prompt(prompt, dialect, model=model)


def _parts(prompt: Prompt) -> Iterator[bytes]:
    if isinstance(prompt, Request):
        yield from (part.data for _, part in prompt.media() if part.data is not None)


def most_output_tokens(prompt: Prompt, strategy: LLMCallStrategy[Any]) -> int | None:
    """The most tokens that the answer may have: the request's own limit, else the strategy's."""
    own: Any = None
    if isinstance(prompt, Request):
        own = prompt.parameters.max_output_tokens
    elif isinstance(prompt, NativeRequest):
        own = _native_limit(prompt.body)
    return own if isinstance(own, int) and own > 0 else strategy.max_output_tokens


def _native_limit(body: Mapping[str, Any]) -> Any:
    config = body.get("generationConfig") or body.get("generation_config")
    if isinstance(config, Mapping):
        return config.get("maxOutputTokens") or config.get("max_output_tokens")
    return next((body[name] for name in _LIMITS if body.get(name)), None)
