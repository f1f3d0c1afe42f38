"""What the providers' strategies have in common: where their client lives, and who closes it."""

from __future__ import annotations

from typing import Any

from batchllm_celery.models import TOutput
from batchllm_celery.strategies.base import LLMCallStrategy, ProcessResources


class ProviderStrategy(LLMCallStrategy[TOutput]):
    """A strategy with a client of a provider.

    The client is shared by the process where a registry has set `resources`. Without one the
    strategy opens resources of its own, and closes them.
    """

    client: Any = None
    _own: ProcessResources | None = None

    async def close(self) -> None:
        """Close what this instance opened for itself; the registry closes what is shared."""
        if self._own is not None:
            own, self._own, self.client = self._own, None, None
            await own.close()

    def _resources(self) -> ProcessResources:
        if self.resources is not None:
            return self.resources
        self._own = self._own or ProcessResources()
        return self._own
