"""Replies of providers as completions and errors, as the dialects read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from batchllm_celery.dialects.answers import Answer, FailedAnswer
from batchllm_celery.dialects.translation import read_answer
from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.models import RawReply
from batchllm_celery.models.request import DialectName


@dataclass(frozen=True, slots=True)
class Reply:
    """What came over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def answer_of(dialect: DialectName, reply: Reply, model_name: str | None) -> Answer:
    """The reply's answer.

    Args:
        dialect: of the request.
        reply: as it came.
        model_name: PROVIDER:MODEL, whose price the call has, and whose quota the headers are about.

    Raises:
        ProviderError: for a reply that is none; it carries tokens, limits and what text there was.
    """
    found = read_answer(dialect, reply.status, reply.headers, reply.body)
    raw = RawReply(found.status, found.request_id, reply.body, dialect)
    limits = found.limits
    if limits is not None:
        limits = limits.model_copy(update={"quota": model_name})
    if isinstance(found, FailedAnswer):
        raise error_of(replace(found, limits=limits, reply=raw))
    return replace(found, limits=limits, priced_as=model_name, reply=raw)


def error_of(failed: FailedAnswer) -> ProviderError:
    """A failed answer as the exception that strategies raise."""
    name, _, words = failed.message.partition(": ")
    return ProviderError(
        words,
        kind=failed.kind,
        status=failed.code or (failed.status if failed.status >= 300 else None),
        retry_after=failed.retry_after,
        usage=dict(failed.usage.items()) if failed.usage else None,
        error_type=name,
        metadata=failed.metadata,
        limits=failed.limits,
        reply=failed.reply,
    )


def refused(what: Any) -> ProviderError:
    """A request that can't be sent as it is; no call is made."""
    return ProviderError(
        str(what), kind=FailureKind.INVALID_REQUEST, error_type="UnsupportedRequest"
    )


def unreadable(what: str) -> ProviderError:
    """The provider's fault: its answer is no answer. The same prompt is asked again, later."""
    return ProviderError(what, kind=FailureKind.UNKNOWN, error_type="BadAnswer")
