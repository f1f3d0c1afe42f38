"""Prompts of claimed items, with the large values that Redis keeps once for many of them.

They are fetched when an item has its slot, never at the claim: a process claims several times as
many items as it runs.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from batchllm_celery.execution.prompts import LARGE_BYTES
from batchllm_celery.ledger import Claim
from batchllm_celery.ledger.claims import Claims
from batchllm_celery.ledger.codec import StoredRequest
from batchllm_celery.models import Prompt

#: Bytes of blobs that a process keeps for the next items.
MOST_KEPT_BYTES = 64 * 1024 * 1024


class Prompts:
    """Builds prompts of one process.

    Args:
        claims: fetches blobs.
        most_bytes: of blobs that stay in memory; what running items need comes on top.
    """

    def __init__(self, claims: Claims, *, most_bytes: int = MOST_KEPT_BYTES) -> None:
        self._claims = claims
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._coming: dict[tuple[str, str], asyncio.Task[dict[str, bytes]]] = {}

    async def of(self, claim: Claim) -> Prompt:
        """The prompt of a claimed item, as it was submitted.

        Raises:
            BlobMissingError: a part of it is no longer in Redis.
            UsageError: it can't be read here: it is of a newer version.
        """
        stored = claim.payload.prompt
        if not isinstance(stored, StoredRequest):
            return stored
        blobs = await self._blobs(claim.batch_id, stored.shas) if stored.shas else {}
        if sum(map(len, blobs.values())) >= LARGE_BYTES:
            return await asyncio.to_thread(stored.build, blobs)
        return stored.build(blobs)

    async def _blobs(self, batch_id: str, shas: tuple[str, ...]) -> dict[str, bytes]:
        found = {sha: self._kept[sha] for sha in shas if sha in self._kept}
        for sha in found:
            self._kept.move_to_end(sha)
        others = [sha for sha in shas if sha not in found]
        wanted = [sha for sha in others if (batch_id, sha) not in self._coming]
        if wanted:
            # A task of its own: others wait for it too, and must not be cancelled with this item.
            fetch = asyncio.ensure_future(self._fetch(batch_id, wanted))
            self._coming |= {(batch_id, sha): fetch for sha in wanted}
        for fetch in {self._coming[batch_id, sha] for sha in others}:
            found |= await asyncio.shield(fetch)
        return found

    async def _fetch(self, batch_id: str, shas: list[str]) -> dict[str, bytes]:
        try:
            fetched = await self._claims.blobs(batch_id, shas)
        finally:
            for sha in shas:
                del self._coming[batch_id, sha]
        for sha, data in fetched.items():
            self._keep(sha, data)
        return fetched

    def _keep(self, sha: str, data: bytes) -> None:
        if len(data) > self._most_bytes or sha in self._kept:
            return
        self._kept[sha] = data
        self._bytes += len(data)
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])
