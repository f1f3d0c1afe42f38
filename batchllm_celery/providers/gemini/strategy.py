"""Gemini by google-genai."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
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
from batchllm_celery.models.request import DialectName
from batchllm_celery.providers.answers import Reply, answer_of, unreadable
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.strategy import Asked, DialectStrategy, parsed
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


class GeminiStrategy(DialectStrategy[TOutput]):
    """Calls a Gemini model. Takes texts, `Request`s and `NativeRequest`s.

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
        allow_dropping: names of parameters that are left out of a `Request` where Gemini has no
            word for them, in place of refusing it.
    """

    provider = "gemini"
    dialect = "gemini"
    dialects: tuple[DialectName, ...] = ("gemini",)

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
        allow_dropping: Collection[str] = (),
    ) -> None:
        self.model = model
        self.client = client
        self.own_client = client is None
        self.response_parser = response_parser
        self.config = config
        self.include_metadata = include_metadata
        self._set_options(
            system=system,
            schema=schema,
            parameters={
                "temperature": temperature,
                "max_output_tokens": max_output_tokens,
                "thinking_budget": thinking_budget,
            },
            allow_dropping=allow_dropping,
        )
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
        # Nobody needs the SDK's models of request and answer: the body is sent as it is.
        self._sends_bodies = (
            client is None and response_parser is None and config is None and not include_metadata
        )
        self._request_config: Any = None
        self._bare_config: Any = None

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
        self._request_config = self._build_config(self._options)
        bare = self._build_config({})
        self._bare_config = _raw(bare) if self._sends_bodies else bare

    async def _open_client(self, resources: ProcessResources) -> Any:
        return await gemini_client.open_client(resources)

    # -- calls

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One `generate_content` call.

        Raises:
            ProviderError: for requests that can't be sent as they are, API errors, blocked,
                truncated, empty and malformed answers.
            Exception: what `response_parser` raises, carrying the answer's tokens.
        """
        asked = await self._ask(prompt, state)
        text = with_feedback(prompt, state) if isinstance(prompt, str) else None
        response, reply = await self._generate(asked, text)
        if self.response_parser is None and not self.include_metadata:
            return self._completed(asked, reply)
        answer = answer_of(asked.dialect, reply, self.model_name)
        with charged(answer.usage):
            output = self._parse(asked, answer, response)
        if self.include_metadata:
            output = GeminiResponse(
                output=output,
                safety_ratings=answer.metadata.get("safety_ratings", {}),
                finish_reason=answer.metadata.get("finish_reason"),
                token_usage=answer.usage,
                raw_response=response,
            )
        return replace(answer, output=output)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next attempt's prompt."""
        remember_feedback(exception, state)

    def classify(self, exception: BaseException) -> Failure | None:
        """SDK errors by their code and details."""
        translated = gemini_client.translate(exception)
        return classify(translated) if translated is not None else None

    async def _generate(self, asked: Asked, text: str | None) -> tuple[Any, Reply]:
        return await self._call(asked, text, self._request_config or self.config)

    async def _call(self, asked: Asked, text: str | None, config: Any) -> tuple[Any, Reply]:
        """One request: the SDK's answer, and the reply beneath it.

        This is the SDK's raw route, with the body as it is: its models cost more than the call, and
        drop unknown fields, also an error in place of the answer. They are built where somebody
        asks for their object, or has a client or a config of his own.

        Args:
            asked: the request.
            text: its text, where it is one.
            config: the SDK's, with our options for a text.
        """
        generate = self.client.aio.models.generate_content
        contents: Any = text
        if text is None and not self._sends_bodies:
            body = {name: value for name, value in asked.body.items() if name != "contents"}
            contents, config = asked.body["contents"], _with_body(self._bare_config, body)
        raw = self.response_parser is None and not self.include_metadata
        try:
            if self._sends_bodies:
                with gemini_client.sending(await asked.encoded()):
                    response = await generate(
                        model=self.model, contents=_IGNORED, config=self._bare_config
                    )
            else:
                response = await generate(
                    model=self.model, contents=contents, config=_raw(config) if raw else config
                )
        except Exception as error:
            translated = gemini_client.translate(error)
            if translated is None and isinstance(error, _UNREADABLE):
                translated = unreadable("the answer's body can't be read")
            if translated is None:
                raise
            raise translated from error
        return response, gemini_client.reply_of(response)

    def _parse(self, asked: Asked, answer: Completion[Any], response: Any) -> Any:
        if self.response_parser is not None:
            return self.response_parser(response)
        return parsed(asked.schema, answer)

    # -- configuration

    def _build_config(self, options: Mapping[str, Any]) -> Any:
        """The given config with these options over it."""
        config_type = importlib.import_module("google.genai.types").GenerateContentConfig
        options = {**options, **_one_request(config_type, own=self.own_client)}
        given = {name: value for name, value in options.items() if value is not None}
        ours = config_type(**given)
        if self.config is None:
            return ours
        base = config_type.model_validate(self.config)
        if base.http_options is not None:
            given.pop("http_options", None)
        return base.model_copy(update={name: getattr(ours, name) for name in given})


#: Contents for the SDK, which wants some: the body that is sent has its own.
_IGNORED = "-"


def _with_body(config: Any, body: Mapping[str, Any]) -> Any:
    """`config`, with these fields in the body that the SDK sends."""
    options_type = importlib.import_module("google.genai.types").HttpOptions
    options = (config.http_options or options_type()).model_copy(update={"extra_body": body})
    return config.model_copy(update={"http_options": options})


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
