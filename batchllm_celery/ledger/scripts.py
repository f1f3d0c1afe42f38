"""The ledger's Lua scripts: each is `batch.lua`, what they share, and a file of its own."""

from __future__ import annotations

from batchllm_celery.connection import Script


def _load(name: str, *, at_maxmemory: bool = True) -> Script:
    # A full Redis refuses new work (create, feed); what finishes work and frees memory must run.
    flags = "allow-oom" if at_maxmemory else ""
    head = f"#!lua flags={flags}\n"
    return Script.load("batchllm_celery.ledger", name, shared="batch.lua", head=head)


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
