"""The openai client: how it is opened, what is sent by it, its errors."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

from batchllm_celery.dialects.answers import FailedAnswer
from batchllm_celery.dialects.translation import read_answer
from batchllm_celery.errors import FailureKind, ProviderError, UsageError, causes_of
from batchllm_celery.models import RawReply
from batchllm_celery.models.request import DialectName
from batchllm_celery.providers.answers import Reply, error_of
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_client, redirected
from batchllm_celery.redaction import keep_secret, keep_secrets_in
from batchllm_celery.strategies.base import Opened, ProcessResources


async def open_client(
    resources: ProcessResources, *, base_url: str | None = None, api_key: str | None = None
) -> Any:
    """The process's one `AsyncOpenAI` for this base URL, on aiohttp, without its own retries.

    Args:
        resources: what the process shares; its `slots` size the connection pool.
        base_url: None: the settings' `openai_base_url`, else the SDK's (OPENAI_BASE_URL, else
            OpenAI's). Never from a message: a key must not travel to a host that one names.
        api_key: None: OPENAI_API_KEY; servers of one's own often need none.

    Raises:
        UsageError: where the `openai` extra is not installed.
        ProviderError: of kind `authentication` where there is no key.
    """
    url = base_url or resources.settings.openai_base_url
    opener = partial(_open, resources.slots, url, api_key)
    # Two keys at one server are two clients; the name may be logged, so it holds a hash.
    return await resources.shared(f"openai client {hash(api_key)} of {url}", opener)


async def _open(slots: int, base_url: str | None, api_key: str | None) -> Opened[Any]:
    openai = await asyncio.to_thread(import_openai)
    key = api_key or os.environ.get("OPENAI_API_KEY")
    keep_secret(key)
    keep_secrets_in(base_url or os.environ.get("OPENAI_BASE_URL"))
    if not key and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ProviderError(
            "no OpenAI API key: set OPENAI_API_KEY "
            "(get one at https://platform.openai.com/api-keys)",
            kind=FailureKind.AUTHENTICATION,
        )
    most = slots + EXTRA_CONNECTIONS
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
        max_connections=most, max_keepalive_connections=most, keepalive_expiry=60.0
    )
    http_client = bounded_client(openai.DefaultAioHttpClient)
    client = openai.AsyncOpenAI(
        api_key=key or "not-needed",
        base_url=base_url,
        max_retries=0,  # they hold a slot for as long as Retry-After says: the runner retries
        timeout=None,  # the runner bounds each attempt
        http_client=http_client(limits=limits, timeout=None),
    )
    return Opened(client, client.close)


def without_retries(client: Any) -> Any:
    """A user's client with the SDK's retries off: a call is one request."""
    if not is_sdk(client) or client.max_retries == 0:
        return client
    return client.with_options(max_retries=0)


def import_openai() -> Any:
    """The SDK.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise UsageError(
            "the openai package is not installed: pip install 'batchllm-celery[openai]'"
        ) from error


# -- requests

#: Where each dialect's body goes.
PATHS: dict[DialectName, str] = {
    "openai": "/chat/completions",
    "responses": "/responses",
    "embeddings": "/embeddings",
}


async def post(client: Any, dialect: DialectName, body: Mapping[str, Any]) -> Reply:
    """Send a body as it is, by the SDK's public raw route: it signs in and picks the address, and
    builds no models.

    Raises:
        Exception: the SDK's, for what came to no reply.
    """
    response = await client.post(
        PATHS[dialect],
        cast_to=_response_class(),
        body=body,
        options={"follow_redirects": False},
    )
    return Reply(response.status_code, response.headers, response.content)


@cache
def _response_class() -> Any:
    """`Response` of the HTTP library that this SDK is built on."""
    library = type(import_openai().DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0]
    return importlib.import_module(library).Response


def is_sdk(client: Any) -> bool:
    """Whether it is the SDK's own, which has the raw route."""
    return type(client).__module__.partition(".")[0] == "openai"


# -- errors


def translate(error: BaseException) -> ProviderError | None:
    """An SDK error as our own; None for anything that the general rules know."""
    if isinstance(error.__cause__, ProviderError):  # our own refusal, beneath a connection error
        return error.__cause__
    status = getattr(error, "status_code", None)
    if type(status) is int and hasattr(error, "body"):
        translated = redirected(error, status) or _refused(status, error)
    elif type(error).__name__ == "APITimeoutError" and _never_connected(error):
        translated = ProviderError(
            "the connection failed or broke",
            kind=FailureKind.CONNECTION,
            error_type="APIConnectionError",
        )
    else:
        return None
    translated.__cause__ = error
    return translated


def _refused(status: int, error: Any) -> ProviderError:
    """The failure that a reply describes; its body, or what the SDK kept of it."""
    response = getattr(error, "response", None)
    content = getattr(response, "content", None)
    if not isinstance(content, bytes):
        kept = error.body if error.body else {"message": str(getattr(error, "message", ""))}
        content = json.dumps({"error": kept}, default=str).encode()
    headers = getattr(response, "headers", None) or {}
    failed = read_answer("openai", status, headers, content)
    assert isinstance(failed, FailedAnswer)  # the SDK raises for what is none only
    return error_of(replace(failed, reply=RawReply(status, failed.request_id, content)))


def _never_connected(error: BaseException) -> bool:
    """On aiohttp the SDK calls every broken connection a timeout; its cause knows better."""
    return any(
        "ClientConnectionError" in {cls.__name__ for cls in type(cause).__mro__}
        and not isinstance(cause, TimeoutError)
        for cause in causes_of(error, contexts=True)
    )
