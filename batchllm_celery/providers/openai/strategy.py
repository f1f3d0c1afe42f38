"""OpenAI, and every server that speaks its chat completions (vLLM, llama.cpp, OpenRouter, ...)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, Failure, RetryState, TOutput
from batchllm_celery.models.request import DialectName
from batchllm_celery.providers.answers import Reply, answer_of
from batchllm_celery.providers.openai import client as openai_client
from batchllm_celery.providers.strategy import Asked, DialectStrategy
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.failures import charged, classify
from batchllm_celery.strategies.structured import Schema, remember_feedback

#: Dialects by the API that texts and requests go to: it comes first.
_APIS: dict[str, tuple[DialectName, ...]] = {
    "chat": ("openai", "responses", "embeddings"),
    "responses": ("responses", "openai", "embeddings"),
}

#: Web pages in place of answers that count as a passing fault. One more, while no other answer has
#: come, means a wrong base URL.
MAX_PAGES = 1


class OpenAICompatibleStrategy(DialectStrategy[TOutput]):
    """Calls `chat/completions` (or `responses`). Takes texts, `Request`s and `NativeRequest`s.

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
        api: `chat` (chat completions) or `responses`, for texts and `Request`s; a `NativeRequest`
            goes where its dialect belongs, embeddings too.
        allow_dropping: names of parameters that are left out of a `Request` where the API has no
            word for them, in place of refusing it.
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
        api: str = "chat",
        allow_dropping: Collection[str] = (),
    ) -> None:
        self.model = model
        self.client = client
        self.response_parser = response_parser
        self.base_url = base_url
        self.max_output_tokens = max_output_tokens
        if api not in _APIS:
            raise UsageError(f"api {api!r}: it is one of {', '.join(_APIS)}")
        self.dialects = _APIS[api]
        self._set_options(
            system=system,
            schema=schema,
            parameters={"temperature": temperature, "max_output_tokens": max_output_tokens},
            allow_dropping=allow_dropping,
            extra=extra,
        )
        self.model_name = f"{self.provider}:{model}"
        self._api_key = api_key
        self._pages: int | None = 0

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

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One request.

        Raises:
            ProviderError: for requests that can't be sent as they are, API errors, blocked,
                truncated, empty and malformed answers.
            Exception: what `response_parser` raises, carrying the answer's tokens.
        """
        asked = await self._ask(prompt, state)
        reply, parse = await self._call(asked)
        self._count_page(reply.body)
        if self.response_parser is None or parse is None:
            return self._completed(asked, reply)
        answer = answer_of(asked.dialect, reply, self.model_name)
        with charged(answer.usage):
            output = self.response_parser(parse())
        return replace(answer, output=output)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        remember_feedback(exception, state)

    def classify(self, exception: BaseException) -> Failure | None:
        """SDK errors by their status and code."""
        translated = openai_client.translate(exception)
        return classify(translated) if translated is not None else None

    async def _call(self, asked: Asked) -> tuple[Reply, Callable[[], Any] | None]:
        """The reply, and how to have the SDK's object of it where a parser wants that: its models
        accept bodies that are no answer, and cost more than the call."""
        try:
            if openai_client.is_sdk(self.client) and (
                self.response_parser is None or asked.dialect != "openai"
            ):
                return await openai_client.post(self.client, asked.dialect, asked.body), None
            own = {name: asked.body[name] for name in ("model", "messages")}
            rest = {name: value for name, value in asked.body.items() if name not in own}
            create = self.client.chat.completions.with_raw_response.create
            raw = await create(**own, extra_body=rest or None)
            return Reply(200, raw.headers, raw.content), raw.parse
        except Exception as error:
            translated = openai_client.translate(error)
            if translated is None:
                raise
            if translated.limits is not None:
                named = {"quota": self.model_name}
                translated.limits = translated.limits.model_copy(update=named)
            raise translated from error

    def _count_page(self, content: bytes) -> None:
        """Count an answer that is a web page; raise after `MAX_PAGES` if no other answer ever came.

        Raises:
            ProviderError: of kind `invalid_request`, so that the row is not called again.
        """
        if not content[:200].lstrip().startswith(b"<"):
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

    def _writer_options(self) -> dict[str, Any]:
        return {"limit_field": self._limit_name()} if self.dialects[0] == "openai" else {}

    def _limit_name(self) -> str:
        # OpenAI's newer models refuse `max_tokens`; many other servers know nothing else.
        return "max_tokens" if self._has_own_server() else "max_completion_tokens"

    def _has_own_server(self) -> bool:
        settings_url = self.resources.settings.openai_base_url if self.resources else None
        url = self.base_url or settings_url or os.environ.get("OPENAI_BASE_URL") or ""
        return bool(url) and "api.openai.com" not in url
