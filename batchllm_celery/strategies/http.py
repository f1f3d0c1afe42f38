"""HTTP to a provider: no redirect is followed, and no answer is larger than we can hold.

A redirect would carry the key and the prompt to a host that nobody chose.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import urljoin

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.redaction import host_of

#: Bytes of one answer, decompressed. Text answers stay under 1 MiB; images come in a few.
MOST_BYTES = 64 * 1024 * 1024
_CHUNK = 64 * 1024


def redirect_error(status: int, url: str, location: str | None) -> ProviderError | None:
    """The failure that a status which sends us elsewhere means, naming the host; else None."""
    if not 300 <= status < 400 or not location:
        return None
    host = host_of(urljoin(url, location))
    return ProviderError(
        f"{status}: the server redirects to {host}, which is not followed: nothing was sent "
        "there. If that is the right host, name it as the base URL",
        kind=FailureKind.INVALID_REQUEST,
        status=status,
        error_type="Redirected",
    )


def refuse_redirect(status: int, url: str, location: str | None) -> None:
    """Let every status pass but those that send us elsewhere.

    Raises:
        ProviderError: of kind `invalid_request`, naming the host.
    """
    if error := redirect_error(status, url, location):
        raise error


def redirected(error: BaseException, status: int) -> ProviderError | None:
    """The same for an SDK's error, of a client that is not ours and follows nothing either."""
    response = getattr(error, "response", None)
    location = (getattr(response, "headers", None) or {}).get("location")
    return redirect_error(status, str(getattr(response, "url", "")), location)


def refuse_size(size: int) -> None:
    """Let an answer of `size` bytes so far pass, up to `MOST_BYTES`.

    Raises:
        ProviderError: of kind `unknown`.
    """
    if size > MOST_BYTES:
        raise ProviderError(
            f"the answer is larger than {MOST_BYTES // 2**20} MiB", error_type="AnswerTooLarge"
        )


@cache
def bounded_response() -> Any:
    """aiohttp's `response_class` of a session that calls a provider."""
    from aiohttp import ClientResponse  # late: it takes a while

    class BoundedResponse(ClientResponse):
        async def start(self, connection: Any) -> Any:
            started = await super().start(connection)
            refuse_redirect(self.status, str(self.url), self.headers.get("location"))
            return started

        async def read(self) -> bytes:
            if self._body is None:
                try:
                    self._body = await self._read_bounded()
                except BaseException:
                    self.close()
                    raise
            return self._body

        async def _read_bounded(self) -> bytes:
            refuse_size(self.content_length or 0)
            parts, size = [], 0
            async for part in self.content.iter_chunked(_CHUNK):
                size += len(part)
                refuse_size(size)
                parts.append(part)
            return b"".join(parts)

    return BoundedResponse


@cache
def bounded_client(client_class: type[Any]) -> type[Any]:
    """The same for a client class of httpx's kind."""

    class BoundedClient(client_class):
        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            options["follow_redirects"] = False
            response = await super().send(request, stream=True, **options)
            try:
                location = response.headers.get("location")
                refuse_redirect(response.status_code, str(request.url), location)
                return response if stream else await _read_bounded(response)
            except BaseException:
                await response.aclose()
                raise

    return BoundedClient


async def _read_bounded(response: Any) -> Any:
    parts, size = [], 0
    async for part in response.aiter_bytes(_CHUNK):
        size += len(part)
        refuse_size(size)
        parts.append(part)
    await response.aclose()
    headers = response.headers.copy()
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        headers.pop(name, None)  # what they tell of has been undone
    return type(response)(
        response.status_code,
        headers=headers,
        content=b"".join(parts),
        request=response.request,
        extensions=response.extensions,
    )
