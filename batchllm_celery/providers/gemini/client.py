"""The google-genai client, and the replies beneath its answers and errors."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import Any

from batchllm_celery.dialects.answers import FailedAnswer
from batchllm_celery.dialects.translation import read_answer
from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.providers.answers import Reply, answer_of, error_of
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_response, redirected
from batchllm_celery.redaction import keep_secret
from batchllm_celery.strategies.base import Opened, ProcessResources


async def open_client(
    resources: ProcessResources, *, base_url: str | None = None, api_key: str | None = None
) -> Any:
    """The process's one `genai.Client` for this base URL, on aiohttp, without its own retries.

    Args:
        resources: what the process shares; its `slots` size the connection pool.
        base_url: None: the SDK's (GOOGLE_GEMINI_BASE_URL, else Google's).
        api_key: None: the SDK's (GOOGLE_API_KEY, else GEMINI_API_KEY).

    Raises:
        ProviderError: of kind `authentication` where there is no key.
    """
    opener = partial(_open, resources.slots, base_url, api_key)
    # Two keys at one server are two clients; the name may be logged, so it holds a hash.
    return await resources.shared(f"gemini client {hash(api_key)} of {base_url}", opener)


async def _open(slots: int, base_url: str | None, api_key: str | None) -> Opened[Any]:
    # Importing takes a second: not on the loop, where other items wait for theirs.
    genai = await asyncio.to_thread(importlib.import_module, "google.genai")
    aiohttp = importlib.import_module("aiohttp")
    types = genai.types
    # It says "AFC is enabled" for each call, at INFO.
    logging.getLogger("google_genai.models").setLevel(logging.WARNING)
    connector = aiohttp.TCPConnector(limit=slots + EXTRA_CONNECTIONS, keepalive_timeout=60)
    session = aiohttp.ClientSession(
        connector=connector,
        # A proxy of the environment leads to Google's, not to a server that we name (the simulated
        # provider, mostly on this machine).
        trust_env=base_url is None,
        response_class=bounded_response(),
        raise_for_status=_raise_for_status,
        middlewares=(_put_body,),
    )
    options = types.HttpOptions(
        base_url=base_url,
        aiohttp_client=session,
        client_args={"follow_redirects": False},
        # The SDK's retries ignore Retry-After, and hold a slot: the item runner retries.
        retry_options=types.HttpRetryOptions(attempts=1),
    )
    try:
        client = genai.Client(api_key=api_key, http_options=options)
    except ValueError as error:
        await session.close()
        raise ProviderError(
            "no Gemini API key: set GEMINI_API_KEY (get one at https://aistudio.google.com/apikey)",
            kind=FailureKind.AUTHENTICATION,
        ) from error

    keep_secret(account_of(client)[-1])
    _disable_continuation(client.aio.models)

    async def close() -> None:
        await client.aio.aclose()
        await session.close()

    return Opened(client, close)


_body: ContextVar[bytes | None] = ContextVar("batchllm_gemini_body", default=None)


@contextmanager
def sending(body: bytes) -> Iterator[None]:
    """Calls inside of the block send this body: the SDK signs in and picks the address, but would
    respell fields, and copy megabytes."""
    token = _body.set(body)
    try:
        yield
    finally:
        _body.reset(token)


async def _put_body(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    """An aiohttp middleware of the session that the SDK uses."""
    body = _body.get()
    if body is not None:
        await request.update_body(body)
    return await handler(request)


async def _raise_for_status(response: Any) -> None:
    """Raise for an error: the SDK would read its body by rules of its own, and lose the status of
    one whose body is not JSON."""
    if response.status < 300:
        # The SDK takes nothing but a 200 for an answer; what came under a 201 is paid for too.
        response.status = 200
        return
    reply = Reply(response.status, response.headers, await response.read())
    read_reply(reply)


def _disable_continuation(models: Any) -> None:
    """Keep `generate_content` to one request, also when PydanticAI calls it with its own config.

    The SDK sends another paid request each time that the finish reason is CONTINUATION.
    """
    generate = models.generate_content

    async def generate_once(*, config: Any = None, **arguments: Any) -> Any:
        if config is None or isinstance(config, Mapping):
            config = {**(config or {}), "automatic_continuation": False}
        elif config.automatic_continuation is not False:
            config = config.model_copy(update={"automatic_continuation": False})
        return await generate(config=config, **arguments)

    models.generate_content = generate_once


def account_of(client: Any) -> list[str]:
    """Server, project, location and key of a client: what a context cache belongs to.

    For hashing only, since the key is among them. Parts that a user's own client hides are empty.
    """
    inner = getattr(client, "_api_client", None)
    options = getattr(inner, "_http_options", None)
    parts = [getattr(options, "base_url", None)]
    parts += [getattr(inner, name, None) for name in ("project", "location", "api_key")]
    return [part if isinstance(part, str) else "" for part in parts]


# -- answers and errors


def read_reply(reply: Reply) -> Any:
    """A reply's answer, whatever its model. Raises as `answer_of` does."""
    return answer_of("gemini", reply, None)


def reply_of(response: Any) -> Reply:
    """The HTTP reply beneath an SDK's answer; its form in JSON where that is not kept, and of what
    only looks like an SDK's answer."""
    http = getattr(response, "sdk_http_response", None)
    body, headers = getattr(http, "body", None), getattr(http, "headers", None)
    if not isinstance(body, str):
        body = json.dumps(_fields_of(response), default=str)
    return Reply(200, dict(headers) if isinstance(headers, Mapping) else {}, body.encode())


def _fields_of(response: Any) -> Any:
    if hasattr(response, "model_dump"):
        return response.model_dump(mode="json", by_alias=True, exclude_none=True)
    fields = {name: _plain(getattr(response, name, None)) for name in _FIELDS}
    text = getattr(response, "text", None)
    if not isinstance(fields["candidates"], list) and isinstance(text, str):
        part = {"content": {"parts": [{"text": text}]}, "finishReason": "STOP"}
        fields["candidates"] = [part]
    return fields


_FIELDS = ("candidates", "prompt_feedback", "usage_metadata", "model_version", "response_id")


def _plain(value: Any) -> Any:
    """An object's attributes as JSON."""
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "__dict__"):
        return {name: _plain(inner) for name, inner in vars(value).items() if name[:1] != "_"}
    return value


def translate(error: BaseException) -> ProviderError | None:
    """An SDK `APIError` as our own; None for anything else (the general rules know it)."""
    details: Any = getattr(error, "details", None)
    code = getattr(error, "code", None) if hasattr(error, "details") else None
    if type(code) is not int:
        return None
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    body = details or {"message": getattr(error, "message", None)}
    translated = redirected(error, code)
    if translated is None:
        reply = Reply(code, headers, json.dumps(body, default=str).encode())
        failed = read_answer("gemini", reply.status, reply.headers, reply.body)
        assert isinstance(failed, FailedAnswer)  # the SDK raises for what is none only
        translated = error_of(failed)
    translated.__cause__ = error
    return translated
