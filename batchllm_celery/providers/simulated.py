"""The simulated provider, in every dialect that it speaks."""

from __future__ import annotations

from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.models import TOutput
from batchllm_celery.models.request import DialectName
from batchllm_celery.providers import direct
from batchllm_celery.providers.answers import Reply
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.gemini.strategy import GeminiStrategy
from batchllm_celery.providers.strategy import Asked
from batchllm_celery.strategies.base import ProcessResources

_KEY = "simulated-key"
_PATHS: dict[DialectName, str] = {
    "openai": "/v1/chat/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
    "anthropic": "/v1/messages",
}
_HEADERS = {
    "Authorization": f"Bearer {_KEY}",
    "x-api-key": _KEY,
    "anthropic-version": "2023-06-01",
}


class SimulatedStrategy(GeminiStrategy[TOutput]):
    """`GeminiStrategy` against the simulated provider at `Settings.simulated_url`.

    Takes the same arguments, and native bodies of every dialect. No API key leaves the process: it
    sends a dummy.
    """

    provider = "simulated"
    dialects = ("gemini", "openai", "responses", "embeddings", "anthropic")

    async def _open_client(self, resources: ProcessResources) -> Any:
        return await open_simulated_client(resources)

    async def _generate(self, asked: Asked, text: str | None) -> tuple[Any, Reply]:
        if asked.dialect == "gemini":
            return await super()._generate(asked, text)
        resources = self._resources()
        session = await direct.open_session(resources)
        url = _url_of(resources).rstrip("/") + _PATHS[asked.dialect]
        return None, await direct.post(session, url, _HEADERS, await asked.encoded())


def _url_of(resources: ProcessResources) -> str:
    url = resources.settings.simulated_url
    if url is None:
        raise UsageError(
            "no simulated provider: start one with `batchllm simulate` and set "
            "BATCHLLM_SIMULATED_URL to the URL it prints"
        )
    return url


async def open_simulated_client(resources: ProcessResources) -> Any:
    """The process's client for the simulated provider.

    Raises:
        UsageError: where the settings name none.
    """
    return await gemini_client.open_client(resources, base_url=_url_of(resources), api_key=_KEY)
