"""Requests of rows, made ready for a worker: files are read, what can't be sent is refused."""

from __future__ import annotations

import logging

from batchllm_celery.errors import InputError
from batchllm_celery.files.parts import PartError, PartReader
from batchllm_celery.ledger import Payload
from batchllm_celery.ledger.codec import StoredRequest
from batchllm_celery.models import Prompt, Request, StrategySpec
from batchllm_celery.strategies.base import LLMCallStrategy

logger = logging.getLogger("batchllm_celery")


class Requests:
    """Prepares the requests of one batch.

    Args:
        parts: reads the files that parts name.
    """

    def __init__(self, parts: PartReader | None = None) -> None:
        self._parts = parts or PartReader()
        self._strategies: dict[str, LLMCallStrategy[object] | None] = {}

    def prepare(self, payload: Payload, index: int, default: StrategySpec) -> None:
        """Read the files of a row's request, and ask its strategy whether it can send it, where the
        strategy is registered in this process.

        Raises:
            InputError: naming the row and the field.
        """
        prompt = payload.prompt
        if isinstance(prompt, str | StoredRequest):
            return
        try:
            if isinstance(prompt, Request):
                payload.prompt = prompt = self._parts.read(prompt)
            why = self._refusal(prompt, payload.strategy or default)
        except PartError as problem:
            why = str(problem)
        if why is not None:
            raise InputError(f"item {index} ({payload.item_id}): {why}")

    def _refusal(self, prompt: Prompt, spec: StrategySpec) -> str | None:
        strategy = self._strategy(spec)
        return None if strategy is None else strategy.refusal(prompt)

    def _strategy(self, spec: StrategySpec) -> LLMCallStrategy[object] | None:
        """An instance that is asked, never called; None where this process can't build one."""
        if spec.key not in self._strategies:
            from batchllm_celery.strategies import catalog  # late: most batches need none

            built = None
            if spec.name in catalog:
                try:
                    built = catalog.lookup(spec.name).build(spec)
                except Exception as error:  # a worker may have what is missing here
                    logger.debug("submit.unchecked error=%s", type(error).__name__)
            self._strategies[spec.key] = built
        return self._strategies[spec.key]
