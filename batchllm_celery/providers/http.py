"""HTTP to a provider: no redirect is followed, and no answer is larger than we can hold.

A redirect would send the key and the prompt to a host that the user did not choose.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import urljoin

from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.redaction import host_of

#: Sockets of a connection pool beyond the worker's slots, for cancelled calls that still close and
#: for calls that need no slot (a context cache's).
EXTRA_CONNECTIONS = 16
#: Bytes of one answer, decompressed. Text answers stay under 1 MiB; images come in a few.
MOST_BYTES = 64 * 1024 * 1024
_CHUNK = 64 * 1024


def redirect_error(status: int, url: str, location: str | None) -> ProviderError | None:
    """The failure for a redirect, naming its host; None for any other status."""
    if not 300 <= status < 400 or not location:
        return None
    try:
        host = host_of(urljoin(url, location))
    except ValueError:  # an address that is none
        host = "no address"
    return ProviderError(
        f"{status}: the server redirects to {host}, which is not followed: nothing was sent "
        "there. If that is the right host, name it as the base URL",
        kind=FailureKind.INVALID_REQUEST,
        status=status,
        error_type="Redirected",
    )


def refuse_redirect(status: int, url: str, location: str | None) -> None:
    """Raise for a redirect.

    Raises:
        ProviderError: of kind `invalid_request`, naming the host.
    """
    if error := redirect_error(status, url, location):
        raise error


def redirected(error: BaseException, status: int) -> ProviderError | None:
    """`redirect_error` for the error of an SDK whose client is not ours."""
    response = getattr(error, "response", None)
    location = (getattr(response, "headers", None) or {}).get("location")
    return redirect_error(status, str(getattr(response, "url", "")), location)


def refuse_size(size: int) -> None:
    """Raise for an answer of more than `MOST_BYTES`; `size` is its bytes so far.

    Raises:
        ProviderError: of kind `unknown`.
    """
    if size > MOST_BYTES:
        raise ProviderError(
            f"the answer is larger than {MOST_BYTES // 2**20} MiB", error_type="AnswerTooLarge"
        )


@cache
def bounded_response() -> Any:
    """The `response_class` of an aiohttp session that calls a provider."""
    from aiohttp import ClientResponse  # late: it takes a while

    class BoundedResponse(ClientResponse):
        async def start(self, connection: Any) -> Any:
            started = await super().start(connection)
            # What aiohttp would follow: beside `Location` a header that no other client knows.
            location = self.headers.get("location") or self.headers.get("uri")
            refuse_redirect(self.status, str(self.url), location)
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
    """A subclass of an httpx client that refuses redirects and bounds bodies."""

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
        headers.pop(name, None)  # the body is decoded and whole by now
    return type(response)(
        response.status_code,
        headers=headers,
        content=b"".join(parts),
        request=response.request,
        extensions=response.extensions,
    )
