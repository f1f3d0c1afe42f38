"""What the workers of the chaos tests import: a light strategy whose every call tells the provider
which process made it.

    celery -A tests.acceptance.chaos_app worker     CHAOS_PROVIDER: the provider's OpenAI URL
"""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp

from batchllm_celery import CallableStrategy, FailureKind, ProviderError, strategy
from batchllm_celery.ledger import locks

if os.environ.get("CHAOS_ELSEWHERE"):
    # Each process as on a machine of its own: nobody sees by its pid that it is dead.
    PLACE = f"m.{secrets.token_hex(4)}"
    mock.patch.object(locks, "_here", return_value=PLACE).start()


class Asking(CallableStrategy[str]):
    """One HTTP session of the process, no SDK."""

    def __init__(self) -> None:
        super().__init__(self._ask, model_name="chaos:light")

    async def prepare(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, prompt: str) -> tuple[str, dict[str, int]]:
        if "POISON" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        _fail_before_repair(prompt)
        body = {
            "model": "light",
            "user": str(os.getpid()),
            "messages": [{"role": "user", "content": prompt}],
        }
        url = f"{os.environ['CHAOS_PROVIDER']}/chat/completions"
        async with self._session.post(url, json=body) as response:
            if response.status != 200:
                raise ProviderError(f"HTTP {response.status}", status=response.status)
            answer = await response.json()
        usage = answer["usage"]
        tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": 1}
        return answer["choices"][0]["message"]["content"], tokens


def _fail_before_repair(prompt: str) -> None:
    """Prompts marked BROKEN fail for good until the test has left its file."""
    if "BROKEN" in prompt and not Path(os.environ["CHAOS_REPAIRED"]).exists():
        raise ProviderError("broken for now", kind=FailureKind.INVALID_REQUEST)


class Instant(CallableStrategy[str]):
    """Answers at once, without a provider."""

    def __init__(self) -> None:
        super().__init__(_answer, model_name="chaos:instant")


async def _answer(prompt: str) -> str:
    return f"answer to {prompt}"


@strategy("chaos")
def chaos() -> Asking:
    return Asking()


@strategy("instant")
def instant() -> Instant:
    return Instant()


def __getattr__(name: str) -> Any:
    """`app` for workers only: the project's own, but what a killed worker had taken from the
    broker comes back after seconds, so that a test can see it go."""
    if name != "app":
        raise AttributeError(name)
    from batchllm_celery.worker.tasks import worker_app

    app = worker_app()
    if seconds := os.environ.get("CHAOS_VISIBILITY"):
        options = {"visibility_timeout": float(seconds), "unacked_restore_interval": 1}
        app.conf.broker_transport_options |= options
    globals()["app"] = app
    return app
