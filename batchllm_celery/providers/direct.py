"""One HTTP function on aiohttp, for those who count CPU: no SDK's models, nor its client.

The answer's size is bounded, and no redirect is followed: see `http`.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from batchllm_celery.providers.answers import Reply
from batchllm_celery.providers.http import EXTRA_CONNECTIONS, bounded_response
from batchllm_celery.strategies.base import Opened, ProcessResources


async def open_session(resources: ProcessResources) -> Any:
    """The process's one session for such calls."""

    async def opener() -> Opened[Any]:
        aiohttp = await asyncio.to_thread(importlib.import_module, "aiohttp")
        most = resources.slots + EXTRA_CONNECTIONS
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=most, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None),  # the runner bounds each attempt
            trust_env=True,
            response_class=bounded_response(),
            auto_decompress=True,
        )
        return Opened(session, session.close)

    return await resources.shared("direct session", opener)


async def post(session: Any, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
    """Send a body, and read the reply whatever its status is.

    Raises:
        ProviderError: for a redirect, and a reply that is too large.
        aiohttp.ClientError: where no reply came.
    """
    given = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    async with session.post(url, data=body, headers=given, allow_redirects=False) as response:
        return Reply(response.status, response.headers, await response.read())
