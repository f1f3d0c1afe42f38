"""Answers of a given shape: JSON found in what a model says, checked, and errors fed back to it."""

from __future__ import annotations

import importlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import regex
from pydantic import BaseModel, ValidationError

from batchllm_celery.errors import FailureKind, ProviderError, UsageError
from batchllm_celery.models import Completion, NativeRequest, Request, RetryState, TOutput
from batchllm_celery.strategies.base import (
    LLMCallStrategy,
    ProcessResources,
    as_completion,
)
from batchllm_celery.strategies.failures import charged, classify

#: A pydantic model, or a JSON Schema.
Schema: TypeAlias = type[TOutput] | Mapping[str, Any]

#: Where `RetryState` keeps what was wrong with the previous answer.
FEEDBACK = "validation_feedback"

_THOUGHTS = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_BRACKET = re.compile(r"[{}\[\]]")
#: A bracket or a whole string. One that is never closed goes to the end of the text.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[{}\[\]]', re.DOTALL)
#: A name before a value: it is a member of something that began before.
_MEMBER = re.compile(r'"\s*:\s*\Z')
_NOT_JSON = (ValueError, RecursionError)  # the latter: brackets nested without end
_MOST_ERRORS = 5
#: Seconds that checking one answer may take. Some patterns never finish on some texts, nor do some
#: schemas on some values, and they block the event loop.
CHECK_SECONDS = 0.5


class OutputSchema:
    """What answers must look like.

    Raises:
        UsageError: for something that is neither a pydantic model nor a valid JSON Schema.
    """

    def __init__(self, schema: Schema[Any]) -> None:
        self.model = schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
        self._check_until = math.inf
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
        self._check_until = time.monotonic() + CHECK_SECONDS
        problem: str | None = "the answer is not valid JSON"
        values = json_values(text)
        if values:
            problem = self._problem(values[-1])
        if problem is None and any(self._contradicts(value, values[-1]) for value in values[:-1]):
            problem = "the answer holds several values that fit; give one"
        if problem is not None:
            raise ProviderError(problem, kind=FailureKind.VALIDATION, error_type="ValidationError")
        return self.model.model_validate(values[-1]) if self.model else values[-1]

    def _contradicts(self, value: Any, final: Any) -> bool:
        """Whether `value` differs and is valid too, so that the meant one is unknown."""
        return bool(value != final) and self._problem(value) is None

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
        try:
            return _list_problems(
                (error.absolute_path, f"must satisfy {_rule(error)}") for error in errors
            )
        except TimeoutError:
            return f"the schema could not be checked within {CHECK_SECONDS:g} s"
        except RecursionError:
            return "the answer is nested too deep to be checked"

    @cached_property
    def _validator(self) -> Any:
        validators = importlib.import_module("jsonschema.validators")
        draft = validators.validator_for(self.json_schema, validators.Draft202012Validator)
        additional = draft.VALIDATORS.get("additionalProperties")
        search = self._search

        def pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
            if validator.is_type(instance, "string") and not search(pattern, instance):
                yield _error(f"{instance!r} does not match {pattern!r}")

        def by_pattern(validator: Any, by: Any, instance: Any, schema: Any) -> Iterator[Any]:
            for key, value in instance.items() if validator.is_type(instance, "object") else ():
                for wanted, part in by.items():
                    if search(wanted, key):
                        yield from validator.descend(value, part, path=key, schema_path=wanted)

        def others(validator: Any, rule: Any, instance: Any, schema: Any) -> Iterator[Any]:
            if validator.is_type(instance, "object"):
                known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
                left = {
                    key: value
                    for key, value in instance.items()
                    if key not in known and not any(search(one, key) for one in patterns)
                }
                yield from additional(validator, rule, left, {})

        ours = {
            "pattern": pattern,
            "patternProperties": by_pattern,
            "additionalProperties": others,
            "uniqueItems": _unique_items,
        }
        rules = {**draft.VALIDATORS, **ours}
        bounded = validators.extend(
            draft, {name: self._in_time(rule) for name, rule in rules.items()}
        )
        # With "$schema" in it, a reference to the root would bring the unbounded validator back.
        return bounded({key: part for key, part in self.json_schema.items() if key != "$schema"})

    def _in_time(self, rule: Any) -> Any:
        """A schema's rule that ends when the answer's time is over."""

        def bounded(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            self._time_left()
            for error in rule(validator, value, instance, schema) or ():
                self._time_left()
                yield error

        return bounded

    def _time_left(self) -> float:
        """Seconds, more than none.

        Raises:
            TimeoutError: the answer's time is over.
        """
        left = self._check_until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _search(self, pattern: str, text: str) -> bool:
        """Whether the pattern is found; by an engine that can be stopped, unlike `re`.

        Raises:
            TimeoutError: the answer's time is over.
        """
        left = min(self._time_left(), CHECK_SECONDS)
        return regex.search(pattern, text, timeout=left) is not None

    def _check_schema(self) -> None:
        """Whatever would fail at every answer fails here, before one is paid for."""
        try:
            json.dumps(self.json_schema)  # it travels so
            self._validator.check_schema(self.json_schema)
            _check_references(self.json_schema, self._validator)
        except importlib.import_module("jsonschema").SchemaError as error:
            path = ".".join(str(part) for part in error.absolute_path) or "its top level"
            raise UsageError(f"not a valid JSON Schema at {path}: {error.message}") from error
        except RecursionError:
            raise UsageError("not a usable JSON Schema: it is nested too deep") from None
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"not a valid JSON Schema: {error}") from error

        words = json.dumps(self.json_schema)
        if '"unevaluatedProperties":' in words and '"patternProperties":' in words:
            raise UsageError(
                "unevaluatedProperties can't be checked beside patternProperties; "
                "use additionalProperties"
            )


#: Keywords whose schemas look at the same value as the schema that holds them.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "extends")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def _check_references(schema: Mapping[str, Any], validator: Any) -> None:
    """Look all references up, and walk them.

    Raises:
        UsageError: for one that leads nowhere (none is fetched from elsewhere), or back to itself
            without a step into the value, which no check of an answer would ever leave.
    """
    referencing = importlib.import_module("referencing")
    dialect = importlib.import_module("referencing.jsonschema")
    default = dialect.specification_with(validator.META_SCHEMA["$schema"])
    root = referencing.Resource.from_contents(schema, default_specification=default)
    registry = importlib.import_module("jsonschema_specifications").REGISTRY
    resolver = registry.with_resource(root.id() or "", root).resolver_with_root(root)
    done: set[int] = set()  # of `id`: equal schemas at two places may lead to different ones
    waiting = [(root, resolver)]
    while waiting:
        resource, at = waiting.pop()
        if id(resource.contents) in done:
            continue
        done.add(id(resource.contents))
        _check_place(resource.contents, at, ())
        waiting += ((one, at.in_subresource(one)) for one in resource.subresources())


def _check_place(schema: Any, resolver: Any, above: tuple[int, ...]) -> None:
    if not isinstance(schema, Mapping):
        return
    if id(schema) in above:
        raise UsageError("not a usable JSON Schema: a $ref leads back to itself")
    above = (*above, id(schema))
    for pattern in (schema.get("pattern"), *(schema.get("patternProperties") or ())):
        _check_pattern(pattern)
    for name in _REFERENCES:
        reference = schema.get(name)
        if isinstance(reference, str):
            found = _look_up(resolver, reference)
            _check_place(found.contents, found.resolver, above)
    for name in _IN_PLACE:
        inner = schema.get(name)
        schemas = inner.values() if name == "dependentSchemas" and inner else inner
        for one in schemas if not isinstance(schemas, Mapping | bool | None) else [schemas]:
            _check_place(one, resolver, above)


def _check_pattern(pattern: Any) -> None:
    try:
        regex.compile(pattern if isinstance(pattern, str) else "")
    except regex.error as error:
        raise UsageError(f"not a usable JSON Schema: pattern {pattern!r}: {error}") from None


def _look_up(resolver: Any, reference: str) -> Any:
    errors = importlib.import_module("referencing.exceptions")
    try:
        return resolver.lookup(reference)
    except (errors.Unresolvable, errors.NoSuchResource) as error:
        raise UsageError(
            f"not a usable JSON Schema: {reference!r} leads nowhere (a schema must hold all that "
            f"it refers to; nothing is fetched)"
        ) from error


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """Linear in the value's size; jsonschema compares each object with each."""
    wanted = unique and validator.is_type(instance, "array")
    if wanted and len({_hashable(item) for item in instance}) < len(instance):
        yield _error("items are not unique")


def _hashable(value: Any) -> Any:
    """Equal for values that are equal in JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((name, _hashable(inner)) for name, inner in value.items())
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return (bool, value) if isinstance(value, bool) else value


def _error(message: str) -> Any:
    return importlib.import_module("jsonschema").ValidationError(message)


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


def json_values(text: str) -> list[Any]:
    """The JSON values that stand in `text` side by side, the final one last: the whole text, or
    what is in it amid prose and fences. Empty where the final one is broken or cut off: neither
    a draft before it nor a part of it is the answer.

    What a model thinks aloud (up to `</think>`) is none of it. Linear in the text's length.
    """
    answer = _after_thoughts(text)
    try:
        return [_loads(answer)]
    except _NOT_JSON:
        return _embedded_values(answer) or _fenced_value(answer)


def _after_thoughts(text: str) -> str:
    """The text after its reasoning; none where that was never closed."""
    if not (tags := list(_THOUGHTS.finditer(text))):
        return text
    return text[tags[-1].end() :] if tags[-1].group(1) else ""


def _embedded_values(text: str) -> list[Any]:
    values: list[Any] = []
    position = 0
    while (bracket := _BRACKET.search(text, position)) is not None:
        start, position = bracket.span()
        if bracket.group() in "}]":
            values = []  # what came so far was part of a value whose beginning is missing
            continue
        end = _end_of_value(text, start)
        if end is None:
            return []
        position = end
        try:
            value = _loads(text[start:end])
        except _NOT_JSON:
            values = []
            continue
        if _MEMBER.search(text, max(0, start - 40), start):
            values = []
        else:
            values.append(value)
    return values


def _end_of_value(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed, strings skipped; None where it never is."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = token.group()
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
            if not depth:
                return token.end()
    return None


def _fenced_value(text: str) -> list[Any]:
    """A string, a number or a word of JSON in the last fenced block."""
    blocks = text.split("```")
    if len(blocks) < 3 or _BRACKET.search(text):
        return []
    block = blocks[-2] if len(blocks) % 2 else blocks[-1]
    for content in (block, *block.split(None, 1)[1:]):  # with and without its language
        try:
            return [_loads(content.strip())]
        except _NOT_JSON:
            continue
    return []


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number beyond all bounds")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


#: JSON as its standard has it: Python's own takes NaN, Infinity and 1e999, which are no numbers.
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
_loads = _DECODER.decode


# -- feeding the error back


def remember_feedback(exception: BaseException, state: RetryState | None) -> None:
    """Keep what was wrong with an answer, for the next attempt's prompt."""
    if state is None:
        return
    failure = classify(exception)
    if failure.kind is FailureKind.VALIDATION:
        state.set(FEEDBACK, failure.message)


PromptT = TypeVar("PromptT", str, Request, str | Request)


def with_feedback(prompt: PromptT, state: RetryState | None) -> PromptT:
    """`prompt`, and what was wrong with the previous answer where there was one: of a `Request` as
    a further user message."""
    feedback = state.get(FEEDBACK) if state is not None else None
    if not feedback:
        return prompt
    words = (
        f"Your previous answer was rejected: {feedback}\n"
        f"Answer again, correcting this. Reply with nothing but the corrected answer."
    )
    return _with_text(prompt, words)


def _with_text(prompt: PromptT, text: str) -> PromptT:
    if isinstance(prompt, Request):
        return prompt.with_user_text(text)
    return f"{prompt}\n\n{text}"


class StructuredStrategy(LLMCallStrategy[TOutput]):
    """Makes any strategy that answers text answer a pydantic model or JSON.

    The schema goes into the prompt; `GeminiStrategy` and `OpenAICompatibleStrategy` have a
    `schema` parameter of their own, which the provider enforces too.

        StructuredStrategy(CallableStrategy(ask), schema=Person)

    Args:
        inner: answers text.
        schema: a pydantic model or a JSON Schema.
    """

    def __init__(self, inner: LLMCallStrategy[Any], schema: Schema[TOutput]) -> None:
        self.inner = inner
        self.schema = OutputSchema(schema)
        self.quota = inner.quota
        self.model_name = inner.model_name
        self.max_output_tokens = inner.max_output_tokens
        self.dialect = inner.dialect
        # A native body is sent as it is: the schema would have no place in it.
        self.accepts = tuple(form for form in inner.accepts if form is not NativeRequest)

    @property
    def full_speed(self) -> bool:
        """As the inner strategy says."""
        return self.inner.full_speed

    async def prepare(self) -> None:
        """Prepare the inner strategy."""
        self.inner.resources = self.resources or ProcessResources()
        await self.inner.prepare()

    async def execute(
        self, prompt: Any, attempt: int, timeout: float, state: RetryState | None = None
    ) -> Completion[Any]:
        """One call; its text is parsed and checked.

        Raises:
            ProviderError: of kind `validation`, carrying the tokens of the answer.
        """
        schema = json.dumps(self.schema.json_schema)
        asked = _with_text(prompt, f"Answer with JSON only, of this JSON Schema:\n{schema}")
        answer = await self.inner.execute(with_feedback(asked, state), attempt, timeout, state)
        completion = as_completion(answer)
        with charged(completion.usage):
            output = self.schema.parse(str(completion.output))
        return replace(completion, output=output)

    async def on_error(
        self, exception: Exception, attempt: int, state: RetryState | None = None
    ) -> None:
        """Keep a validation error for the next prompt, and call the inner strategy's `on_error`."""
        remember_feedback(exception, state)
        await self.inner.on_error(exception, attempt, state)

    async def cleanup(self) -> None:
        """The inner strategy's."""
        await self.inner.cleanup()

    async def close(self) -> None:
        """Close the inner strategy."""
        await self.inner.close()

    def models(self) -> tuple[str, ...]:
        """The inner strategy's."""
        return self.inner.models()

    def classify(self, exception: BaseException) -> Any:
        """The inner strategy's."""
        return self.inner.classify(exception)
