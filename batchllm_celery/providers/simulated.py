"""The simulated provider: the real Gemini client, pointed at a server of ours."""

from __future__ import annotations

from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.models import TOutput
from batchllm_celery.providers.gemini import client as gemini_client
from batchllm_celery.providers.gemini.strategy import GeminiStrategy
from batchllm_celery.strategies.base import ProcessResources


class SimulatedStrategy(GeminiStrategy[TOutput]):
    """`GeminiStrategy` against the simulated provider at `Settings.simulated_url`.

    Takes the same arguments. No API key leaves the process: it sends a dummy.
    """

    provider = "simulated"

    async def _open_client(self, resources: ProcessResources) -> Any:
        return await open_simulated_client(resources)


async def open_simulated_client(resources: ProcessResources) -> Any:
    """The process's client for the simulated provider.

    Raises:
        UsageError: where the settings name none.
    """
    url = resources.settings.simulated_url
    if url is None:
        raise UsageError(
            "no simulated provider: start one with `batchllm simulate` and set "
            "BATCHLLM_SIMULATED_URL to the URL it prints"
        )
    return await gemini_client.open_client(resources, base_url=url, api_key="simulated-key")
