"""The limiter's real scripts on a real Redis, with a clock that tests and benchmarks set.

Only `TIME`, `INFO` and `LASTSAVE` are ours: a few lines before the unchanged script text shadow
`redis.call`. So hours pass in seconds, and a restart is a changed run id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from batchllm_celery.connection import Script

PRELUDE = """
local real, clock, run_id = redis, tonumber(ARGV[#ARGV - 1]), ARGV[#ARGV]
ARGV[#ARGV], ARGV[#ARGV - 1] = nil, nil
local redis, published = {}, {}
function redis.call(name, ...)
  if name == 'TIME' then return {math.floor(clock / 1000000), clock % 1000000} end
  if name == 'PUBLISH' then published[#published + 1] = {...} end
  return real.call(name, ...)
end
function redis.pcall(name, ...)
  if name == 'LASTSAVE' then return math.floor(clock / 1000000) end
  if name == 'INFO' then return 'run_id:' .. run_id .. '\\r\\n' end
  return real.pcall(name, ...)
end
local function script()
"""
END = "\nend\nreturn {script(), published}\n"


class VirtualRedis:
    """Runs scripts of the limiter at `now` (seconds)."""

    def __init__(self, url: str, start: float = 1_800_000_000.0) -> None:
        self.client = redis.Redis.from_url(url)
        self.now = start
        self.run_id = "first"
        self._loaded: dict[str, str] = {}
        self.published: list[list[bytes]] = []
        """Channel and message of what the latest script published."""

    def call(self, script: Script, keys: list[str], args: Sequence[Any] = ()) -> Any:
        """Run a script at the present virtual moment."""
        sha = self._loaded.get(script.sha)
        if sha is None:
            sha = self._loaded[script.sha] = self.client.script_load(PRELUDE + script.text + END)
        arguments = [*args, round(self.now * 1e6), self.run_id]
        called = self.client.execute_command("EVALSHA", sha, len(keys), *keys, *arguments)
        reply, self.published = called
        if isinstance(reply, Exception):  # a script's own error, which Redis nests
            raise reply
        return reply
