"""The ledger's Lua scripts, in `lua/`. Each includes `batch.lua`, which holds what they share."""

from __future__ import annotations

from batchllm_celery.connection import Script

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
SEAL = _load("seal.lua")
CLAIM = _load("claim.lua")
BEGIN = _load("begin.lua")
SAVE = _load("save.lua")
RECORD = _load("record.lua")
RELEASE = _load("release.lua")
BEAT = _load("beat.lua")
ADOPT = _load("adopt.lua")
EXPIRE = _load("expire.lua")
OFFER = _load("offer.lua")
SWEEP = _load("sweep.lua")
CONTROL = _load("control.lua")
REOPEN = _load("reopen.lua")
TRIM = _load("trim.lua")
LOCK = _load("lock.lua")
PROGRESS = _load("progress.lua")
