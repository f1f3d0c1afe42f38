"""The ledger's Lua scripts, in `lua/`, and how a process runs them.

Each script includes `batch.lua`, which holds what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, Script, is_broken, why
from batchllm_celery.errors import BatchNotFoundError, BatchUnreadableError
from batchllm_celery.keys import Keys

Argument = bytes | str | int | float

# A full Redis refuses new work (create, feed); what finishes work and frees memory must run. Redis
# 6.2 has no flags. There the first write of a script decides: one that adds nothing but might
# (SETRANGE) is refused as a whole, one that removes (HDEL of what nobody has) lets it go on.
_AT_MAXMEMORY = ("#!lua flags=allow-oom\n", "redis.call('HDEL', KEYS[1], '')\n")
_NOT_THEN = ("#!lua flags=\n", "redis.call('SETRANGE', KEYS[3], 0, '')\n")


def _load(name: str, *, at_maxmemory: bool = True) -> Script:
    head, before_7 = _AT_MAXMEMORY if at_maxmemory else _NOT_THEN
    return Script.load("batchllm_celery.ledger", f"lua/{name}", head=head, head_before_7=before_7)


CREATE = _load("create.lua", at_maxmemory=False)
FEED = _load("feed.lua", at_maxmemory=False)
RENEW = _load("renew.lua")
BLOBS = _load("blobs.lua", at_maxmemory=False)
SEAL = _load("seal.lua")
CLAIM = _load("claim.lua")
BEGIN = _load("begin.lua")
SAVE = _load("save.lua")
RECORD = _load("record.lua")
RELEASE = _load("release.lua")
BEAT = _load("beat.lua")
RECLAIM = _load("reclaim.lua")
EXPIRE = _load("expire.lua")
REQUEUE = _load("requeue.lua")
SWEEP = _load("sweep.lua")
CONTROL = _load("control.lua")
REOPEN = _load("reopen.lua")
TRIM = _load("trim.lua")
LOCK = _load("lock.lua")
PROGRESS = _load("progress.lua")
APPEND = _load("append.lua", at_maxmemory=False)
LOOKUP = _load("lookup.lua")
CANCEL_ITEM = _load("cancel_item.lua")
TOLD = _load("told.lua")


class ScriptRunner:
    """Runs scripts on batches of one namespace, for one process."""

    def __init__(self, connection: Connection, keys: Keys, process_id: str) -> None:
        self.connection = connection
        self.keys = keys
        self.process_id = process_id

    async def run(self, script: Script, batch_id: str, args: Sequence[Argument] = ()) -> Any:
        """The script's reply, however long Redis is away.

        Raises:
            BatchNotFoundError: the batch has no keys.
            BatchUnreadableError: a key or a field of the batch is not what it should be.
        """
        keys, client = key_list(self.keys, batch_id), self.connection.client
        try:
            reply = await self.connection.patiently(lambda: script(client, keys, args))
        except ResponseError as error:
            if not is_broken(error):
                raise
            self.connection.broken.add("batch", batch_id, error)
            raise unreadable(batch_id, why(error)) from error
        if reply is None:
            raise BatchNotFoundError(
                f"batch {batch_id!r} is unknown: never submitted to this Redis and namespace, "
                f"or kept no longer"
            )
        return reply


@lru_cache(maxsize=1024)
def key_list(keys: Keys, batch_id: str) -> tuple[str, ...]:
    """The keys of a batch in the order in which the scripts take them."""
    names = keys.batch(batch_id)
    return tuple(getattr(names, name) for name in names.__dataclass_fields__)


def text(value: bytes | str) -> str:
    """A string of a reply."""
    return value.decode() if isinstance(value, bytes) else value


def unreadable(batch_id: str, reason: str) -> BatchUnreadableError:
    """The error for a batch whose keys or fields are broken."""
    return BatchUnreadableError(
        f"batch {batch_id!r} can't be read in Redis ({reason}): "
        f"`batchllm doctor` says how to remove it"
    )
