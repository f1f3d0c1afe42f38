"""Anthropic's models, by the Messages API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from batchllm_celery.models import Completion, RetryState, TOutput
from batchllm_celery.providers.anthropic import client as anthropic_client
from batchllm_celery.providers.strategy import DialectStrategy
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.structured import Schema, remember_feedback


class AnthropicStrategy(DialectStrategy[TOutput]):
    """Calls `messages`. Takes texts, `Request`s and `NativeRequest`s.

        AnthropicStrategy("claude-sonnet-4-5", system=HANDBOOK, cache=True)

    Needs the `anthropic` extra.

    Args:
        model: name of the model.
        client: an `AsyncAnthropic` of your own; None: one shared by the process, on aiohttp, with
            a connection pool of the worker's slots and the SDK's retries off. Not closed if yours.
        base_url: the server; None: ANTHROPIC_BASE_URL, else Anthropic's. Set it in code that the
            worker runs: a message can't.
        api_key: None: ANTHROPIC_API_KEY.
        system: system prompt.
        schema: pydantic model or JSON Schema of the output; the provider enforces it, we check it,
            and a wrong answer is retried with the error fed back.
        temperature: sampling temperature.
        max_output_tokens: where an answer is cut (which fails the item as `truncated`); None: 4096,
            since the API needs a limit.
        thinking_budget: tokens for thinking.
        cache: mark what the requests share (tools and system prompt), so that it is cached.
        extra: further fields of the request's body.
        allow_dropping: names of parameters that are left out of a `Request` where the API has no
            word for them, in place of refusing it.
    """

    provider = "anthropic"
    dialect = "anthropic"
    cached_input_counts = False
    dialects = ("anthropic",)

    def __init__(
        self,
        model: str,
        client: Any = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        schema: Schema | None = None,
        temperature: float | None = None,
        max_output_tokens: int | None = None,
        thinking_budget: int | None = None,
        cache: bool = False,
        extra: Mapping[str, Any] | None = None,
        allow_dropping: Collection[str] = (),
    ) -> None:
        self.model = model
        self.client = client
        self.base_url = base_url
        self.max_output_tokens = max_output_tokens
        self.model_name = f"{self.provider}:{model}"
        self.cache = bool(cache)
        self._api_key = api_key
        self._set_options(
            system=system,
            schema=schema,
            parameters={
                "temperature": temperature,
                "max_output_tokens": max_output_tokens,
                "thinking_budget": thinking_budget,
            },
            allow_dropping=allow_dropping,
            extra=extra,
        )

    async def prepare(self) -> None:
        """Open the client, or use the given one.

        Raises:
            UsageError: where the `anthropic` extra is not installed.
            ProviderError: of kind `authentication` where there is no API key.
        """
        if self.client is None:
            self.client = await anthropic_client.open_client(
                self._resources(), base_url=self.base_url, api_key=self._api_key
            )
        else:
            keep_secret(getattr(self.client, "api_key", None))
            self.client = anthropic_client.without_retries(self.client)

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One request.

        Raises:
            ProviderError: for requests that can't be sent as they are, API errors, refused,
                truncated, empty and malformed answers.
        """
        asked = await self._ask(prompt, state)
        return self._completed(asked, await anthropic_client.post(self.client, asked.body))

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        remember_feedback(exception, state)

    def _writer_options(self) -> dict[str, Any]:
        return {"cache": self.cache}
