"""What the workers of test_rolling_deploy.py import: a strategy that their own process can break.

DEPLOY_FAULT   what is wrong with this worker: "no strategy", "no key", "no package", "wrong key",
               "no memory", "older parameters"; nothing if unset
DEPLOY_PARAMETERS_AFTER
               seconds until parameters that nobody takes fail their items; 30 if unset
"""

from __future__ import annotations

import asyncio
import importlib
import os

from batchllm_celery import FailureKind, LLMCallStrategy, ProviderError, RetryState, strategy
from batchllm_celery.worker import items

FAULT = os.environ.get("DEPLOY_FAULT", "")
items.PARAMETERS_AFTER = float(os.environ.get("DEPLOY_PARAMETERS_AFTER") or items.PARAMETERS_AFTER)


class Summarise(LLMCallStrategy[str]):
    """Answers with its process' id."""

    async def prepare(self) -> None:
        if FAULT == "no key":
            raise ProviderError("set DEPLOY_KEY", kind=FailureKind.AUTHENTICATION)
        if FAULT == "no package":
            importlib.import_module("a_package_that_nobody_has")

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, dict[str, int]]:
        if FAULT == "wrong key":
            raise ProviderError("who are you?", kind=FailureKind.AUTHENTICATION, status=401)
        if FAULT == "no memory":
            raise MemoryError
        await asyncio.sleep(0.1)
        return str(os.getpid()), {"input_tokens": 1}


if FAULT == "older parameters":

    @strategy("summarise")
    def older() -> LLMCallStrategy[str]:
        return Summarise()

elif FAULT == "no strategy":

    @strategy("summarise-v0")
    def before() -> LLMCallStrategy[str]:
        return Summarise()

else:

    @strategy("summarise")
    def summarise(style: str = "short") -> LLMCallStrategy[str]:
        return Summarise()
