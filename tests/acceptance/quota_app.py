"""A light strategy for workers of quota tests and benchmarks (`BATCHLLM_APP`): one POST.

QUOTA_URL   the simulated provider's OpenAI-like endpoint, `http://127.0.0.1:PORT/v1`
"""

from __future__ import annotations

import os
import time

import aiohttp

from batchllm_celery import LLMCallStrategy, RetryState, TokenUsage, strategy
from batchllm_celery.errors import FailureKind, ProviderError


class Lite(LLMCallStrategy[str]):
    """One prompt, one POST over the process' only session."""

    async def prepare(self) -> None:
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, TokenUsage]:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": prompt}],
            "user": f"{os.getpid()} {time.time()}",
        }
        async with self.session.post(
            os.environ["QUOTA_URL"] + "/chat/completions", json=body
        ) as reply:
            if reply.status != 200:
                raise self._error(reply)
            answer = await reply.json()
        usage = answer["usage"]
        tokens = TokenUsage(
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            total_tokens=usage["total_tokens"],
        )
        return "ok", tokens

    def _error(self, reply: aiohttp.ClientResponse) -> ProviderError:
        if reply.status != 429:
            kind = FailureKind.OVERLOADED if reply.status == 503 else FailureKind.UNKNOWN
            return ProviderError(f"status {reply.status}", kind=kind)
        exact = reply.headers.get("retry-after-ms")
        whole = reply.headers.get("retry-after")
        wait = float(exact) / 1000 if exact else float(whole) if whole else None
        return ProviderError("429", kind=FailureKind.RATE_LIMITED, retry_after=wait)

    async def close(self) -> None:
        await self.session.close()


@strategy("lite")
def lite() -> LLMCallStrategy[str]:
    return Lite()
