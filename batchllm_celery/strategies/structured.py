"""Answers of a given shape: JSON found in what a model says, checked, and errors fed back to it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, RetryState
from batchllm_celery.strategies.base import (
    LLMCallStrategy,
    ProcessResources,
    as_completion,
)
from batchllm_celery.strategies.failures import charged, classify

#: A pydantic model, or a JSON Schema.
Schema: TypeAlias = type[BaseModel] | Mapping[str, Any]

#: Where `RetryState` keeps what was wrong with the previous answer.
FEEDBACK = "validation_feedback"

_FENCE = re.compile(r"```[\w-]*\s*\n?(.*?)```", re.DOTALL)
_NOT_JSON = (ValueError, RecursionError)  # the latter: brackets nested without end
_MOST_STARTS = 100  # a broken answer of a million braces must not cost a million scans
_MOST_ERRORS = 5


class OutputSchema:
    """What answers must look like.

    Raises:
        UsageError: for something that is neither a pydantic model nor a valid JSON Schema.
    """

    def __init__(self, schema: Schema) -> None:
        self.model = schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
        if self.model is not None:
            self.json_schema: dict[str, Any] = self.model.model_json_schema()
        elif isinstance(schema, Mapping):
            self.json_schema = dict(schema)
            self._check_schema()
        else:
            raise UsageError(
                f"a schema must be a pydantic model or a JSON Schema object, not {schema!r}"
            )

    @property
    def name(self) -> str:
        """A short name for providers that want one."""
        title = str(self.json_schema.get("title") or "answer")
        return re.sub(r"[^\w-]", "_", title)[:64]

    def parse(self, text: str) -> Any:
        """The value in `text` that fits: a model instance, or plain JSON for a JSON Schema.

        Raises:
            ProviderError: of kind `validation`; says what is wrong, never quotes the answer.
        """
        problem = None
        for value in json_values(text):
            found = self._problem(value)
            if found is None:
                return self.model.model_validate(value) if self.model else value
            problem = problem or found
        raise ProviderError(
            problem or "the answer is not valid JSON",
            kind=FailureKind.VALIDATION,
            error_type="ValidationError",
        )

    def _problem(self, value: Any) -> str | None:
        return self._model_problem(value) if self.model else self._schema_problem(value)

    def _model_problem(self, value: Any) -> str | None:
        assert self.model is not None
        try:
            self.model.model_validate(value)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            return _list_problems((detail["loc"], detail["msg"]) for detail in details)
        return None

    def _schema_problem(self, value: Any) -> str | None:
        # jsonschema's own messages quote the answer; path and rule say as much.
        errors = self._validator.iter_errors(value)
        return _list_problems(
            (error.absolute_path, f"must satisfy {_rule(error)}") for error in errors
        )

    @cached_property
    def _validator(self) -> Any:
        validators = importlib.import_module("jsonschema.validators")
        draft = validators.validator_for(self.json_schema, validators.Draft202012Validator)
        return draft(self.json_schema)

    def _check_schema(self) -> None:
        try:
            self._validator.check_schema(self.json_schema)
        except importlib.import_module("jsonschema").SchemaError as error:
            path = ".".join(str(part) for part in error.absolute_path) or "its top level"
            raise UsageError(f"not a valid JSON Schema at {path}: {error.message}") from error


def _rule(error: Any) -> str:
    rule = json.dumps({error.validator: error.validator_value}, default=str)
    return rule if len(rule) <= 120 else f"{error.validator!r}"


def _list_problems(problems: Any) -> str | None:
    lines = [
        f"{'.'.join(str(part) for part in path) or 'the answer'}: {text}" for path, text in problems
    ]
    if not lines:
        return None
    more = len(lines) - _MOST_ERRORS
    return "; ".join(lines[:_MOST_ERRORS]) + (f"; and {more} more" if more > 0 else "")


def json_values(text: str) -> Iterator[Any]:
    """JSON values in `text`, likeliest first: all of it (then nothing else), fenced blocks,
    objects and arrays amid prose."""
    try:
        yield json.loads(text)
    except _NOT_JSON:
        yield from _fenced_values(text)
        yield from _embedded_values(text)


def _fenced_values(text: str) -> Iterator[Any]:
    for match in _FENCE.finditer(text):
        try:
            yield json.loads(match.group(1))
        except _NOT_JSON:
            continue


def _embedded_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(_MOST_STARTS):
        start = re.compile(r"[{\[]").search(text, position)
        if start is None:
            return
        try:
            value, position = decoder.raw_decode(text, start.start())
        except _NOT_JSON:
            position = start.end()
        else:
            yield value


# -- feeding the error back


def remember_feedback(exception: BaseException, state: RetryState | None) -> None:
    """Keep what was wrong with an answer, for the next attempt's prompt."""
    if state is None:
        return
    failure = classify(exception)
    if failure.kind is FailureKind.VALIDATION:
        state.set(FEEDBACK, failure.message)


def with_feedback(prompt: str, state: RetryState | None) -> str:
    """`prompt`, and what was wrong with the previous answer where there was one."""
    feedback = state.get(FEEDBACK) if state is not None else None
    if not feedback:
        return prompt
    return (
        f"{prompt}\n\nYour previous answer was rejected: {feedback}\n"
        f"Answer again, correcting this. Reply with nothing but the corrected answer."
    )


class StructuredStrategy(LLMCallStrategy[Any]):
    """Makes any strategy that answers text answer a pydantic model or JSON.

    The schema goes into the prompt; `GeminiStrategy` and `OpenAICompatibleStrategy` have a
    `schema` parameter of their own, which the provider enforces too.

        StructuredStrategy(CallableStrategy(ask), schema=Person)

    Args:
        inner: answers text.
        schema: a pydantic model or a JSON Schema.
    """

    def __init__(self, inner: LLMCallStrategy[Any], schema: Schema) -> None:
        self.inner = inner
        self.schema = OutputSchema(schema)
        self.quota = inner.quota
        self.model_name = inner.model_name
        self.max_output_tokens = inner.max_output_tokens

    @property
    def full_speed(self) -> bool:
        """As the inner strategy says."""
        return self.inner.full_speed

    async def prepare(self) -> None:
        """Prepare the inner strategy."""
        self.inner.resources = self.resources or ProcessResources()
        await self.inner.prepare()

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One call; its text is parsed and checked.

        Raises:
            ProviderError: of kind `validation`, carrying the tokens of the answer.
        """
        schema = json.dumps(self.schema.json_schema)
        asked = f"{prompt}\n\nAnswer with JSON only, of this JSON Schema:\n{schema}"
        answer = await self.inner.execute(with_feedback(asked, state), attempt, timeout, state)
        completion = as_completion(answer)
        with charged(completion.usage):
            output = self.schema.parse(str(completion.output))
        return Completion(output, completion.usage, completion.metadata)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next prompt; tell the inner strategy too."""
        remember_feedback(exception, state)
        await self.inner.on_error(exception, attempt, state)

    async def cleanup(self) -> None:
        """The inner strategy's."""
        await self.inner.cleanup()

    async def close(self) -> None:
        """Close the inner strategy."""
        await self.inner.close()

    def classify(self, exception: BaseException) -> Any:
        """The inner strategy's."""
        return self.inner.classify(exception)
