"""What the providers' strategies have in common: where their client lives, and what they send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from batchllm_celery.dialects.refusals import Refusals
from batchllm_celery.dialects.translation import as_request, with_text, write_request
from batchllm_celery.errors import ProviderError
from batchllm_celery.models import (
    Completion,
    NativeRequest,
    Prompt,
    Request,
    RetryState,
    TOutput,
)
from batchllm_celery.models.request import DialectName, Parameters, SystemMessage, UserMessage
from batchllm_celery.providers.answers import Reply, answer_of, refused
from batchllm_celery.strategies.base import LLMCallStrategy, ProcessResources, unsupported
from batchllm_celery.strategies.failures import charged
from batchllm_celery.strategies.structured import OutputSchema, Schema, with_feedback

#: Bytes of parts from which on a body is built in a thread: base64 of 5 MB takes 20 ms.
LARGE_BYTES = 256 * 1024
MEGABYTE = 1024 * 1024
#: Bytes of a body that providers take with its parts in it. What is larger has to be uploaded
#: first, which is not done here.
MOST_BODY_BYTES: dict[DialectName, int] = {
    "gemini": 20 * MEGABYTE,
    "openai": 50 * MEGABYTE,
    "responses": 50 * MEGABYTE,
    "embeddings": 50 * MEGABYTE,
    "anthropic": 32 * MEGABYTE,
}


class ProviderStrategy(LLMCallStrategy[TOutput]):
    """A strategy with a client of a provider.

    The client is shared by the process where a registry has set `resources`. Without one the
    strategy opens resources of its own, and closes them.
    """

    client: Any = None
    _own: ProcessResources | None = None

    async def close(self) -> None:
        """Close what this instance opened for itself; the registry closes what is shared."""
        if self._own is not None:
            own, self._own, self.client = self._own, None, None
            await own.close()

    def _resources(self) -> ProcessResources:
        if self.resources is not None:
            return self.resources
        self._own = self._own or ProcessResources()
        return self._own


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it is sent.

    Args:
        dialect: of the body.
        body: to send; not to be changed.
        schema: what the answer is checked against.
        dropped: parameters that were left out by permission.
    """

    dialect: DialectName
    body: dict[str, Any]
    schema: OutputSchema | None = None
    dropped: tuple[str, ...] = ()

    async def encoded(self) -> bytes:
        """The body's JSON, of a large one made in a thread."""
        if is_large(self.body):
            return await asyncio.to_thread(_encoded, self.body)
        return _encoded(self.body)


def _encoded(body: Mapping[str, Any]) -> bytes:
    # ASCII: half a surrogate pair, which some texts have, is no UTF-8.
    return json.dumps(body).encode("ascii")


def is_large(body: Any) -> bool:
    """Whether a body's texts are so long that it takes a while to write them."""
    left, waiting = LARGE_BYTES, [body]
    while waiting and left > 0:
        value = waiting.pop()
        if isinstance(value, str):
            left -= len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return left <= 0


class DialectStrategy(ProviderStrategy[TOutput]):
    """A strategy that sends bodies of a dialect and reads the replies by it.

    A text is one user message beside the strategy's own options; a `Request` is written in the
    dialect, and its own values beat the options; a `NativeRequest` is sent as it is, or translated
    where it is of another provider.
    """

    accepts: tuple[type[Any], ...] = (str, Request, NativeRequest)
    #: Dialects of native bodies that are sent as they are; texts and requests take the first.
    dialects: tuple[DialectName, ...] = ()
    model: str
    schema: OutputSchema | None = None
    #: Parameters that may be left out where the provider has no word for them.
    allow_dropping: Collection[str] = ()

    _system: str | None = None
    _parameters = Parameters()
    _extra: Mapping[str, Any] = {}
    _template: dict[str, Any] | None = None

    def _set_options(
        self,
        *,
        system: str | None,
        schema: Schema | None,
        parameters: Mapping[str, Any],
        allow_dropping: Collection[str] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._system = system
        self.schema = OutputSchema(schema) if schema is not None else None
        given = {name: value for name, value in parameters.items() if value is not None}
        self._parameters = Parameters(**given)
        self.allow_dropping = tuple(allow_dropping or ())
        self._extra = dict(extra or {})

    # -- what is asked

    def refusal(self, prompt: Prompt) -> str | None:
        """Why this prompt can't be sent as it is; None where it can. It makes no call."""
        why = unsupported(self, prompt)
        if why is not None:
            return why
        try:
            self._asked(prompt, None)
        except ProviderError as error:
            return str(error)
        return None

    async def _ask(self, prompt: Prompt, state: RetryState | None) -> Asked:
        if isinstance(prompt, Request) and _bytes_of(prompt) >= LARGE_BYTES:
            return await asyncio.to_thread(self._asked, prompt, state)
        return self._asked(prompt, state)

    def _asked(self, prompt: Prompt, state: RetryState | None) -> Asked:
        """The body for a prompt of any form.

        Raises:
            ProviderError: of kind `invalid_request`, naming each field that can't be sent.
        """
        dialect = self.dialects[0]
        if isinstance(prompt, str):
            if self._template is None:
                empty = self._with_options(Request(messages=(UserMessage(content=""),)))
                self._template = {**self._written(empty).body, **self._extra}
            text = with_feedback(prompt, state)
            return Asked(dialect, with_text(self._template, dialect, text), self.schema)
        if isinstance(prompt, NativeRequest):
            if prompt.dialect in self.dialects:
                return Asked(prompt.dialect, self._native_body(prompt))
            translated = as_request(prompt)
            if isinstance(translated, Refusals):
                raise refused(translated)
            prompt = translated
        request = with_feedback(self._with_options(prompt), state)
        asked = self._written(request)
        return replace(asked, body={**self._extra, **asked.body})

    def _written(self, request: Request) -> Asked:
        dialect = self.dialects[0]
        _check_size(request, dialect)
        written = write_request(
            request,
            dialect,
            model=self.model,
            allow_dropping=self.allow_dropping,
            **self._writer_options(),
        )
        if isinstance(written, Refusals):
            raise refused(written)
        schema = self.schema
        if request.schema is not None and (schema is None or schema.json_schema != request.schema):
            schema = _schema(json.dumps(request.schema))
        return Asked(dialect, written.body, schema, written.dropped)

    def _writer_options(self) -> dict[str, Any]:
        return {}

    def _native_body(self, prompt: NativeRequest) -> dict[str, Any]:
        named = prompt.body.get("model")
        if named is not None and str(named).removeprefix("models/") != self.model:
            raise refused("body.model: differs from the strategy's model")
        body = dict(prompt.body)
        if prompt.dialect == "gemini":
            body.pop("model", None)  # it stands in the address
        return body

    def _with_options(self, request: Request) -> Request:
        """The request with the strategy's options where it has no value of its own."""
        changes: dict[str, Any] = {}
        if self._system is not None and request.messages[0].role != "system":
            changes["messages"] = (SystemMessage(content=self._system), *request.messages)
        missing = {
            name: value
            for name, value in self._parameters.given().items()
            if name not in request.parameters.given()
        }
        if missing:
            changes["parameters"] = request.parameters.model_copy(update=missing)
        if self.schema is not None and request.schema is None:
            changes["schema"] = self.schema.json_schema
        return request.model_copy(update=changes) if changes else request

    # -- what is answered

    def _completed(self, asked: Asked, reply: Reply) -> Completion[Any]:
        """The reply's answer, checked against the schema.

        Raises:
            ProviderError: for a reply that is no answer, or not what the schema says.
        """
        answer = answer_of(asked.dialect, reply, self.model_name)
        with charged(answer.usage):
            output = parsed(asked.schema, answer)
        if asked.dropped:
            metadata = {**answer.metadata, "dropped_parameters": list(asked.dropped)}
            answer = replace(answer, metadata=metadata)
        return replace(answer, output=output)


def parsed(schema: OutputSchema | None, answer: Completion[Any]) -> Any:
    """An answer's text by the schema; a call of tools has none."""
    if schema is None or answer.metadata.get("finish_reason") == "tool_calls":
        return answer.output
    if answer.metadata.get("n", 1) > 1:
        return [schema.parse(str(text)) for text in answer.output]
    return schema.parse(str(answer.output))


@lru_cache(maxsize=64)
def _schema(text: str) -> OutputSchema:
    return OutputSchema(json.loads(text))


def _bytes_of(request: Request) -> int:
    return sum(len(part.data) for _, part in request.media() if part.data is not None)


def _check_size(request: Request, dialect: DialectName) -> None:
    """Refuse parts that are too large to stand in a body."""
    most, total = MOST_BODY_BYTES[dialect], 0
    for path, part in request.media():
        total += (len(part.data or b"") + 2) // 3 * 4
        if total > most:
            raise refused(
                f"{path}: with this file the request is larger than the {most // MEGABYTE} MB that "
                "the provider takes"
            )
