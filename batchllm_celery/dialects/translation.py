"""Bodies and answers by the dialect's name, and bodies of one dialect for a provider of another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from batchllm_celery.dialects import anthropic, gemini, openai, responses
from batchllm_celery.dialects.answers import Answer, FailedAnswer
from batchllm_celery.dialects.refusals import Refusal, Refusals
from batchllm_celery.dialects.writing import Written
from batchllm_celery.models.request import DialectName, NativeRequest, Request

_READERS: dict[DialectName, Callable[[Any], Request | Refusals]] = {
    "openai": openai.read_request,
    "responses": responses.read_request,
    "gemini": gemini.read_request,
    "anthropic": anthropic.read_request,
}
_WRITERS: dict[DialectName, Callable[..., Written | Refusals]] = {
    "openai": openai.write_request,
    "responses": responses.write_request,
    "gemini": gemini.write_request,
    "anthropic": anthropic.write_request,
}
_ANSWERS: dict[DialectName, Callable[..., Answer | FailedAnswer]] = {
    "openai": openai.read_answer,
    "responses": responses.read_answer,
    "embeddings": openai.read_embeddings,
    "gemini": gemini.read_answer,
    "anthropic": anthropic.read_answer,
}


def as_request(native: NativeRequest) -> Request | Refusals:
    """A native body in words of no provider, or each field that can't be carried to another."""
    reader = _READERS.get(native.dialect)
    if reader is None:
        refusal = Refusal("body", f"unsupported: only its own provider answers {native.dialect}")
        return Refusals((refusal,))
    return reader(native.body)


def write_request(
    request: Request,
    dialect: DialectName,
    *,
    model: str,
    allow_dropping: Collection[str] = (),
    **options: Any,
) -> Written | Refusals:
    """The body of a request in this dialect, or what can't be said in it."""
    return _WRITERS[dialect](request, model=model, allow_dropping=allow_dropping, **options)


def read_answer(
    dialect: DialectName, status: int, headers: Mapping[str, str] | None, body: bytes
) -> Answer | FailedAnswer:
    """A reply to a request of this dialect; never raises, whatever the body is."""
    return _ANSWERS[dialect](status, headers, body)


# -- a text in the place of another one


def with_text(body: Mapping[str, Any], dialect: DialectName, text: str) -> dict[str, Any]:
    """A copy of a body that `write_request` made, with another text in its last turn."""
    if dialect == "gemini":
        turn = {"role": "user", "parts": [{"text": text}]}
        return {**body, "contents": [*body["contents"][:-1], turn]}
    name = "input" if dialect == "responses" else "messages"
    turn = {**body[name][-1], "content": text}
    return {**body, name: [*body[name][:-1], turn]}
