"""The limiter's Lua scripts, with the functions that read and write their records."""

from __future__ import annotations

import re

from batchllm_celery.connection import Script
from batchllm_celery.limiter.protocol import (
    PROTOCOL,
    AcquireReply,
    AcquireRequest,
    LimitReport,
)
from batchllm_celery.limiter.quota_state import (
    BREAKER_FAILURES,
    FULL_SPEED,
    START_RATE,
    Congestion,
    LiveState,
    QuotaSetup,
    ReportedLimits,
)
from batchllm_celery.limiter.records import lua_locals, lua_packed, lua_reader, lua_writer

_PACKAGE = "batchllm_celery.limiter"
_STATE_RECORDS = (
    lua_reader("setup", QuotaSetup) + lua_reader("live", LiveState) + lua_writer("live", LiveState)
)
_CONSTANTS = (
    f"local PROTOCOL, BREAKER_FAILURES = {PROTOCOL}, {BREAKER_FAILURES}\n"
    f"local START_RATE, FULL_SPEED = {START_RATE}, {FULL_SPEED}\n"
)
#: The records whose fields are locals of acquire.lua.
_LOCALS: dict[str, type] = {
    "request": AcquireRequest,
    "setup": QuotaSetup,
    "live": LiveState,
    "congestion": Congestion,
    "headers": ReportedLimits,
    "report": LimitReport,
}
_READ_OR_PACK = re.compile(r"^ *--#(read|pack) (\w+)(?: (.+))?\n", re.MULTILINE)


def _with_locals(script: Script) -> Script:
    def line(found: re.Match[str]) -> str:
        verb, name, packed = found.groups()
        if verb == "read":
            return lua_locals(name, _LOCALS[name], packed)
        return lua_packed(name, _LOCALS[name])

    return Script.of(script.name, _READ_OR_PACK.sub(line, script.text))


ACQUIRE = _with_locals(
    Script.load(_PACKAGE, "lua/acquire.lua", head=_CONSTANTS + lua_writer("reply", AcquireReply))
)
CONFIGURE = Script.load(_PACKAGE, "lua/configure.lua", head=_CONSTANTS + _STATE_RECORDS)
STATE = Script.load(_PACKAGE, "lua/state.lua")
