"""OpenAI, and every server that speaks its chat completions (vLLM, llama.cpp, OpenRouter, ...)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.models import Completion, Failure, RetryState, TOutput
from batchllm_celery.providers import bodies
from batchllm_celery.providers.openai import client as openai_client
from batchllm_celery.providers.strategy import ProviderStrategy
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.failures import charged, classify
from batchllm_celery.strategies.structured import (
    OutputSchema,
    Schema,
    remember_feedback,
    with_feedback,
)

#: Web pages in place of answers that count as a passing fault. One more, while no other answer has
#: come, means a wrong base URL.
MAX_PAGES = 1


class OpenAICompatibleStrategy(ProviderStrategy[TOutput]):
    """Calls `chat/completions`.

        OpenAICompatibleStrategy("gpt-4.1-mini", system="Answer in one word.")
        OpenAICompatibleStrategy("qwen3", base_url="http://localhost:8000/v1", schema=Person)

    Args:
        model: name of the model.
        client: an `AsyncOpenAI` of your own; None: one shared by the process, on aiohttp, with a
            connection pool of the worker's slots and the SDK's retries off. Not closed if yours.
        response_parser: turns the SDK's response into the output; None: its text, or what
            `schema` says.
        base_url: the server; None: BATCHLLM_OPENAI_BASE_URL, else OPENAI_BASE_URL, else OpenAI's.
            Set it in code that the worker runs: a message can't.
        api_key: None: OPENAI_API_KEY.
        system: system message.
        schema: pydantic model or JSON Schema of the output; sent as `response_format`, checked
            here, and a wrong answer is retried with the error fed back.
        temperature: sampling temperature.
        max_output_tokens: where an answer is cut (which fails the item as `truncated`).
        extra: further fields of the request's body (`{"reasoning_effort": "low"}`).
    """

    provider = "openai"

    def __init__(
        self,
        model: str,
        client: Any = None,
        response_parser: Callable[[Any], TOutput] | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        schema: Schema[TOutput] | None = None,
        temperature: float | None = None,
        max_output_tokens: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.client = client
        self.response_parser = response_parser
        self.base_url = base_url
        self.system = system
        self.schema = OutputSchema(schema) if schema is not None else None
        self.temperature = temperature
        self.max_output_tokens = max_output_tokens
        self.extra = dict(extra or {})
        self.model_name = f"{self.provider}:{model}"
        self._api_key = api_key
        self._pages: int | None = 0
        self._request: dict[str, Any] | None = None

    @property
    def full_speed(self) -> bool:
        """Whether it calls a server of your own, whose slots and refusals set the rate."""
        return self._has_own_server()

    async def prepare(self) -> None:
        """Open the client, or use the given one.

        Raises:
            UsageError: where the `openai` extra is not installed.
            ProviderError: of kind `authentication` where there is no API key.
        """
        if self.client is None:
            self.client = await openai_client.open_client(
                self._resources(), base_url=self.base_url, api_key=self._api_key
            )
        else:
            keep_secret(getattr(self.client, "api_key", None))
            self.client = openai_client.without_retries(self.client)
        self._request = self._build_request()

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One `chat.completions.create` call.

        Raises:
            ProviderError: for API errors, blocked, truncated, empty and malformed answers.
            Exception: what `response_parser` raises, carrying the answer's tokens.
        """
        response, parsed = await self._call(with_feedback(prompt, state))
        usage, guessed = openai_client.usage_of(response)
        with charged(usage):
            output = self._parse(response, parsed)
        metadata: dict[str, Any] = {"finish_reason": openai_client.finish_reason_of(response)}
        if guessed:
            metadata["usage_guessed"] = True
        return Completion(output, usage, metadata)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        remember_feedback(exception, state)

    def classify(self, exception: BaseException) -> Failure | None:
        """SDK errors by their status and code."""
        translated = openai_client.translate(exception)
        return classify(translated) if translated is not None else None

    async def _call(self, prompt: str) -> tuple[Any, Callable[[], Any]]:
        """The answer's body, and how to have the SDK's object of it.

        This is the SDK's raw route. Its models accept bodies that are no answer.
        """
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        request = self._request if self._request is not None else self._build_request()
        create = self.client.chat.completions.with_raw_response.create
        try:
            raw = await create(messages=messages, **request)
        except Exception as error:
            translated = openai_client.translate(error)
            if translated is None:
                raise
            raise translated from error
        self._count_page(raw.content)
        response = openai_client.read_answer(raw.content, raw.headers)
        return response, raw.parse

    def _count_page(self, content: bytes) -> None:
        """Count an answer that is a web page; raise after `MAX_PAGES` if no other answer ever came.

        Raises:
            ProviderError: of kind `invalid_request`, so that the row is not called again.
        """
        if not bodies.is_page(content[:200].decode("utf-8", "replace")):
            self._pages = None
        elif self._pages is not None:
            self._pages += 1
            if self._pages > MAX_PAGES:
                raise ProviderError(
                    "the server answers web pages, not JSON: check the base URL "
                    "(it usually ends in /v1)",
                    kind=FailureKind.INVALID_REQUEST,
                    error_type="WrongServer",
                )

    def _build_request(self) -> dict[str, Any]:
        """What every call has in common."""
        options = {
            "temperature": self.temperature,
            self._limit_name(): self.max_output_tokens,
            "response_format": self._response_format(),
            "extra_body": self.extra or None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return {"model": self.model, **given}

    def _limit_name(self) -> str:
        # OpenAI's newer models refuse `max_tokens`; many other servers know nothing else.
        return "max_tokens" if self._has_own_server() else "max_completion_tokens"

    def _has_own_server(self) -> bool:
        settings_url = self.resources.settings.openai_base_url if self.resources else None
        url = self.base_url or settings_url or os.environ.get("OPENAI_BASE_URL") or ""
        return bool(url) and "api.openai.com" not in url

    def _response_format(self) -> dict[str, Any] | None:
        if self.schema is None:
            return None
        described = {"name": self.schema.name, "schema": self.schema.json_schema}
        return {"type": "json_schema", "json_schema": described}

    def _parse(self, response: Any, parsed: Callable[[], Any]) -> Any:
        if self.response_parser is not None:
            openai_client.check_answer(response)
            return self.response_parser(parsed())
        text = openai_client.text_of(response)
        return self.schema.parse(text) if self.schema is not None else text
