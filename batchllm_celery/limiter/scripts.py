"""The limiter's Lua scripts, with the functions that read and write their records."""

from __future__ import annotations

from batchllm_celery.connection import Script
from batchllm_celery.limiter.protocol import PROTOCOL, AcquireReply, AcquireRequest
from batchllm_celery.limiter.quota_state import (
    BREAKER_FAILURES,
    FULL_SPEED,
    START_RATE,
    LiveState,
    QuotaSetup,
)
from batchllm_celery.limiter.records import lua_reader, lua_writer

_PACKAGE = "batchllm_celery.limiter"
_STATE_RECORDS = (
    lua_reader("setup", QuotaSetup) + lua_reader("live", LiveState) + lua_writer("live", LiveState)
)
_CALL_RECORDS = lua_reader("request", AcquireRequest) + lua_writer("reply", AcquireReply)
_CONSTANTS = (
    f"local PROTOCOL, BREAKER_FAILURES = {PROTOCOL}, {BREAKER_FAILURES}\n"
    f"local START_RATE, FULL_SPEED = {START_RATE}, {FULL_SPEED}\n"
)

ACQUIRE = Script.load(_PACKAGE, "lua/acquire.lua", head=_CONSTANTS + _STATE_RECORDS + _CALL_RECORDS)
CONFIGURE = Script.load(_PACKAGE, "lua/configure.lua", head=_CONSTANTS + _STATE_RECORDS)
STATE = Script.load(_PACKAGE, "lua/state.lua")
