"""Gemini by google-genai."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from typing import Any, Generic

from pydantic import Field, ValidationError

from batchllm_celery.models import (
    NO_TOKENS,
    Completion,
    Failure,
    Model,
    RetryState,
    TokenUsage,
    TOutput,
)
from batchllm_celery.providers.bodies import unreadable
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.strategy import ProviderStrategy
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.base import ProcessResources
from batchllm_celery.strategies.failures import charged, classify
from batchllm_celery.strategies.structured import (
    OutputSchema,
    Schema,
    remember_feedback,
    with_feedback,
)

#: What the SDK raises while it reads a body. The request was checked when it was prepared.
_UNREADABLE = (JSONDecodeError, UnicodeDecodeError, ValidationError)


class GeminiResponse(Model, Generic[TOutput]):
    """The output with what came along, under `include_metadata=True`."""

    output: TOutput
    safety_ratings: dict[str, str] = Field(default_factory=dict)
    finish_reason: str | None = None
    token_usage: TokenUsage = NO_TOKENS
    raw_response: Any = Field(default=None, exclude=True, repr=False)
    """The SDK's own object: in process only, it is not stored with the result."""


class GeminiStrategy(ProviderStrategy[TOutput]):
    """Calls a Gemini model.

        GeminiStrategy(model="gemini-2.5-flash", system="Answer in one word.")
        GeminiStrategy(model="gemini-2.5-flash", schema=Person)          # answers are `Person`s
        GeminiStrategy("gemini-2.5-flash", client, lambda response: response.text.upper())

    Args:
        model: name of the model.
        client: a `genai.Client` of your own; None: one shared by the process, on aiohttp, with a
            connection pool of the worker's slots and the SDK's retries off. Not closed if yours.
        response_parser: turns the SDK's response into the output; None: its text, or what
            `schema` says.
        config: a `GenerateContentConfig` (or dict) to start from.
        include_metadata: answer a `GeminiResponse` in place of the bare output.
        system: system instruction.
        schema: pydantic model or JSON Schema of the output; the provider enforces it, we check
            it, and a wrong answer is retried with the error fed back.
        temperature: sampling temperature.
        max_output_tokens: where an answer is cut (which fails the item as `truncated`).
        thinking_budget: tokens for thinking; 0 turns it off where the model can.
    """

    provider = "gemini"

    def __init__(
        self,
        model: str,
        client: Any = None,
        response_parser: Callable[[Any], TOutput] | None = None,
        config: Any = None,
        include_metadata: bool = False,
        *,
        system: str | None = None,
        schema: Schema[TOutput] | None = None,
        temperature: float | None = None,
        max_output_tokens: int | None = None,
        thinking_budget: int | None = None,
    ) -> None:
        self.model = model
        self.client = client
        self.own_client = client is None
        self.response_parser = response_parser
        self.config = config
        self.include_metadata = include_metadata
        self.schema = OutputSchema(schema) if schema is not None else None
        self.model_name = f"{self.provider}:{model}"
        self.max_output_tokens = max_output_tokens
        self._options: dict[str, Any] = {
            "system_instruction": system,
            "temperature": temperature,
            "max_output_tokens": max_output_tokens,
            "thinking_config": (
                None if thinking_budget is None else {"thinking_budget": thinking_budget}
            ),
            **_structured(self.schema),
        }
        self._request_config: Any = None

    # -- life cycle

    async def prepare(self) -> None:
        """Open the client, or use the given one.

        Raises:
            ProviderError: of kind `authentication` where there is no API key.
        """
        if self.client is None:
            self.client = await self._open_client(self._resources())
        else:
            keep_secret(gemini_client.account_of(self.client)[-1])
        await asyncio.to_thread(importlib.import_module, "google.genai.types")
        self._request_config = self._build_config({})

    async def _open_client(self, resources: ProcessResources) -> Any:
        return await gemini_client.open_client(resources)

    # -- calls

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One `generate_content` call.

        Raises:
            ProviderError: for API errors, blocked, truncated, empty and malformed answers.
            Exception: what `response_parser` raises, carrying the answer's tokens.
        """
        response = await self._generate(with_feedback(prompt, state))
        usage = gemini_client.usage_of(response)
        with charged(usage):
            gemini_client.check_answer(response)
            output = self._parse(response)
        ratings = gemini_client.safety_ratings_of(response)
        finish = gemini_client.finish_reason_of(response)
        metadata: dict[str, Any] = {"finish_reason": finish}
        if ratings:
            metadata["safety_ratings"] = ratings
        if self.include_metadata:
            output = GeminiResponse(
                output=output,
                safety_ratings=ratings,
                finish_reason=finish,
                token_usage=usage,
                raw_response=response,
            )
        return Completion(output, usage, metadata)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        remember_feedback(exception, state)

    def classify(self, exception: BaseException) -> Failure | None:
        """SDK errors by their code and details."""
        translated = gemini_client.translate(exception)
        return classify(translated) if translated is not None else None

    async def _generate(self, contents: Any) -> Any:
        return await self._call(contents, self._request_config or self.config)

    async def _call(self, contents: Any, config: Any) -> Any:
        """One answer, as an object with the SDK's names.

        This is the SDK's raw route. Its models drop unknown fields, also an error in place of the
        answer. A `response_parser` gets the SDK's own object.
        """
        raw = self.response_parser is None and not self.include_metadata
        try:
            response = await self.client.aio.models.generate_content(
                model=self.model, contents=contents, config=_raw(config) if raw else config
            )
        except Exception as error:
            translated = gemini_client.translate(error)
            if translated is None and isinstance(error, _UNREADABLE):
                translated = unreadable("the answer's body can't be read")
            if translated is None:
                raise
            raise translated from error
        http: Any = getattr(response, "sdk_http_response", None)
        body = getattr(http, "body", None)
        if not raw or not isinstance(body, str):
            return response  # its own object; a client of the user's may know no raw route
        return gemini_client.read_answer(body, http.headers)

    def _parse(self, response: Any) -> Any:
        if self.response_parser is not None:
            return self.response_parser(response)
        text = gemini_client.text_of(response)
        return self.schema.parse(text) if self.schema is not None else text

    # -- configuration

    def _build_config(self, extra: Mapping[str, Any]) -> Any:
        """The given config with our options over it."""
        config_type = importlib.import_module("google.genai.types").GenerateContentConfig
        options = {**self._options, **extra, **_one_request(config_type, own=self.own_client)}
        given = {name: value for name, value in options.items() if value is not None}
        ours = config_type(**given)
        if self.config is None:
            return ours
        base = config_type.model_validate(self.config)
        if base.http_options is not None:
            given.pop("http_options", None)
        return base.model_copy(update={name: getattr(ours, name) for name in given})


def _raw(config: Any) -> Any:
    """`config`, asking the SDK for the HTTP answer as it came."""
    asked = {"should_return_http_response": True}
    if config is None or isinstance(config, Mapping):
        return {**(config or {}), **asked}
    return config.model_copy(update=asked)


def _one_request(config_type: Any, *, own: bool) -> dict[str, Any]:
    """Keeps the SDK to one request a call: more would be paid without a permit, and uncounted."""
    options: dict[str, Any] = {"automatic_function_calling": {"disable": True}}
    if "automatic_continuation" in config_type.model_fields:
        options["automatic_continuation"] = False
    if not own:  # ours has its retries off already
        options["http_options"] = {"retry_options": {"attempts": 1}}
    return options


def _structured(schema: OutputSchema | None) -> dict[str, Any]:
    if schema is None:
        return {}
    return {
        "response_mime_type": "application/json",
        "response_json_schema": schema.json_schema,
    }
