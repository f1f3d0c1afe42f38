"""The anthropic client: how it is opened, what is sent by it, its errors."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from batchllm_celery.errors import FailureKind, ProviderError, UsageError, causes_of
from batchllm_celery.providers.answers import Reply
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_client, redirected
from batchllm_celery.redaction import keep_secret, keep_secrets_in
from batchllm_celery.strategies.base import Opened, ProcessResources


async def open_client(
    resources: ProcessResources, *, base_url: str | None = None, api_key: str | None = None
) -> Any:
    """The process's one `AsyncAnthropic` for this base URL, on aiohttp, without its own retries.

    Args:
        resources: what the process shares; its `slots` size the connection pool.
        base_url: None: the SDK's (ANTHROPIC_BASE_URL, else Anthropic's). Never from a message: a
            key must not travel to a host that one names.
        api_key: None: ANTHROPIC_API_KEY.

    Raises:
        UsageError: where the `anthropic` extra is not installed.
        ProviderError: of kind `authentication` where there is no key.
    """
    opener = partial(_open, resources.slots, base_url, api_key)
    # Two keys at one server are two clients; the name may be logged, so it holds a hash.
    return await resources.shared(f"anthropic client {hash(api_key)} of {base_url}", opener)


async def _open(slots: int, base_url: str | None, api_key: str | None) -> Opened[Any]:
    anthropic = await asyncio.to_thread(import_anthropic)
    key = api_key or os.environ.get("ANTHROPIC_API_KEY")
    keep_secret(key)
    keep_secrets_in(base_url or os.environ.get("ANTHROPIC_BASE_URL"))
    if not key:
        raise ProviderError(
            "no Anthropic API key: set ANTHROPIC_API_KEY "
            "(get one at https://console.anthropic.com/settings/keys)",
            kind=FailureKind.AUTHENTICATION,
        )
    most = slots + EXTRA_CONNECTIONS
    limits = type(anthropic.DEFAULT_CONNECTION_LIMITS)(
        max_connections=most, max_keepalive_connections=most, keepalive_expiry=60.0
    )
    http_client = bounded_client(anthropic.DefaultAioHttpClient)
    client = anthropic.AsyncAnthropic(
        api_key=key,
        base_url=base_url,
        max_retries=0,  # they hold a slot for as long as Retry-After says: the runner retries
        timeout=None,  # the runner bounds each attempt
        http_client=http_client(limits=limits, timeout=None),
    )
    return Opened(client, client.close)


def without_retries(client: Any) -> Any:
    """A user's client with the SDK's retries off: a call is one request."""
    return client.with_options(max_retries=0) if getattr(client, "max_retries", 0) else client


def import_anthropic() -> Any:
    """The SDK.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        return importlib.import_module("anthropic")
    except ImportError as error:
        raise UsageError(
            "the anthropic package is not installed: pip install 'batchllm-celery[anthropic]'"
        ) from error


async def post(client: Any, body: Mapping[str, Any]) -> Reply:
    """Send a body as it is, by the SDK's public raw route: it signs in and picks the address, and
    builds no models.

    Raises:
        ProviderError: the connection failed, or the server redirects.
        Exception: the SDK's, for what else came to no reply.
    """
    try:
        response = await client.post(
            "/v1/messages",
            cast_to=_response_class(),
            body=body,
            options={"follow_redirects": False},
        )
    except Exception as error:
        reply = _reply_of(error)
        if reply is None:
            raise
        return reply
    return Reply(response.status_code, response.headers, response.content)


@cache
def _response_class() -> Any:
    """`Response` of the HTTP library that this SDK is built on."""
    library = type(import_anthropic().DEFAULT_CONNECTION_LIMITS).__module__.partition(".")[0]
    return importlib.import_module(library).Response


def _reply_of(error: Exception) -> Reply | None:
    """The reply beneath an SDK's error; None where none came.

    Raises:
        ProviderError: the connection failed, or the server redirects.
    """
    if isinstance(error.__cause__, ProviderError):  # our own refusal, beneath a connection error
        raise error.__cause__
    status = getattr(error, "status_code", None)
    response: Any = getattr(error, "response", None)
    if type(status) is int and isinstance(getattr(response, "content", None), bytes):
        refused = redirected(error, status)
        if refused is not None:
            raise refused from error
        return Reply(status, response.headers, response.content)
    if type(error).__name__ == "APITimeoutError" and _never_connected(error):
        raise ProviderError(
            "the connection failed or broke",
            kind=FailureKind.CONNECTION,
            error_type="APIConnectionError",
        ) from error
    return None


def _never_connected(error: BaseException) -> bool:
    """On aiohttp the SDK calls every broken connection a timeout; its cause knows better."""
    return any(
        "ClientConnectionError" in {cls.__name__ for cls in type(cause).__mro__}
        and not isinstance(cause, TimeoutError)
        for cause in causes_of(error, contexts=True)
    )
