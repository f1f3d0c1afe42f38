"""The ledger of one process: what Redis knows of every item, one object for each role.

A batch of 10 million items keeps in Redis, besides the items in work, 80 MB of fingerprints and
three bitmaps of 1.25 MB. No process keeps anything per item that is done.
"""

from __future__ import annotations

from typing import Self

from batchllm_celery.connection import Connection
from batchllm_celery.keys import Keys
from batchllm_celery.ledger.background import BackgroundWork
from batchllm_celery.ledger.batches import Batches
from batchllm_celery.ledger.claims import Claims
from batchllm_celery.ledger.feeding import Feeding
from batchllm_celery.ledger.recovery import Recovery
from batchllm_celery.ledger.scripts import ScriptRunner
from batchllm_celery.ledger.standing import Standing
from batchllm_celery.settings import Settings


class Ledger:
    """What Redis knows of every item; one of these per process.

    An async context manager; closing it ends its own background work only.

    Attributes:
        batches: look at batches, steer them, read results (anybody).
        feeding: create a batch and store its rows (a producer).
        claims: the items that this process runs (a worker).
        standing: single items, and those who wait for them (anybody).
        recovery: items of dead processes and lost messages (a worker).

    Args:
        connection: the process's Redis.
        keys: the fleet's names.
        process_id: unique for ever (see `new_process_id`): never one that has been used before.
        settings: lease, slots, limits.
    """

    def __init__(
        self, connection: Connection, keys: Keys, *, process_id: str, settings: Settings
    ) -> None:
        self.connection = connection
        self.keys = keys
        self.runner = ScriptRunner(connection, keys, process_id)
        self.background = BackgroundWork()
        self.batches = Batches(self.runner, self.background, settings)
        self.feeding = Feeding(self.runner, self.batches, settings)
        self.standing = Standing(self.runner, self.batches, self.feeding, self.background, settings)
        self.claims = Claims(self.runner, self.batches, self.background, settings)
        self.recovery = Recovery(self.runner, self.batches, self.claims, settings)

    @property
    def process_id(self) -> str:
        return self.runner.process_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait some seconds for outcomes that are on their way; stop sweeps."""
        self.batches.close()
        await self.background.close()
