"""The fleet's register of worker processes, for people to look at; nothing depends on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, is_broken, readable
from batchllm_celery.keys import Keys

#: Seconds after which a process that says nothing leaves the register.
WORKER_TTL = 60


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker process, as it last described itself."""

    worker_id: str
    host: str = ""
    pid: int = 0
    slots: int = 0
    running: int = 0
    """Items that it works on."""
    queues: str = ""
    started_at: float = 0.0
    """Unix time of its own clock."""
    last_seen: float = 0.0
    """Unix time of the Redis server."""
    dropped_messages: int = 0
    """Messages that nobody can run."""
    unreadable: str = ""
    """Batches that it can't read, separated by commas: corrupted, or of a newer version."""
    strategies: str = ""
    """Registered names, separated by commas."""
    unrunnable: str = ""
    """What it can't run: a JSON object, strategy -> [reason, Unix time since when]."""

    def commands(self, keys: Keys, now: float) -> list[tuple[str | int | float, ...]]:
        """The Redis commands that say "I am here" at server time `now`."""
        key, fields = keys.worker(self.worker_id), {**asdict(self), "last_seen": now}
        flat = [part for pair in fields.items() for part in pair]
        return [
            ("HSET", key, *flat),
            ("EXPIRE", key, WORKER_TTL),
            ("ZADD", keys.workers, now, self.worker_id),
            ("ZREMRANGEBYSCORE", keys.workers, "-inf", now - WORKER_TTL),
            ("EXPIRE", keys.workers, WORKER_TTL),
        ]

    def farewell(self, keys: Keys) -> list[tuple[str | int | float, ...]]:
        """The Redis commands with which a process leaves."""
        return [("DEL", keys.worker(self.worker_id)), ("ZREM", keys.workers, self.worker_id)]

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> WorkerInfo:
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return cls(
            text["worker_id"],
            text.get("host", ""),
            int(text.get("pid", 0)),
            int(text.get("slots", 0)),
            int(text.get("running", 0)),
            text.get("queues", ""),
            float(text.get("started_at", 0)),
            float(text.get("last_seen", 0)),
            int(text.get("dropped_messages", 0)),
            text.get("unreadable", ""),
            text.get("strategies", ""),
            _unrunnable(text.get("unrunnable", "")),
        )


def _unrunnable(told: str) -> str:
    """`told`, if it can be read.

    Raises:
        ValueError, TypeError: else.
    """
    for reason, since in json.loads(told or "{}").values():
        if type(reason) is not str or not math.isfinite(since):
            raise ValueError("a worker's list of what it can't run")
    return told


async def list_workers(connection: Connection, keys: Keys) -> list[WorkerInfo]:
    """The processes seen within the last minute, the latest first."""
    client: Any = connection.client
    try:
        ids = await connection.patiently(lambda: client.zrevrange(keys.workers, 0, -1))
    except ResponseError as error:
        if not is_broken(error):
            raise
        connection.broken.add("list", keys.workers, error)
        return []
    found = []
    for worker_id in readable(ids, "worker", connection.broken):
        try:
            fields = await client.hgetall(keys.worker(worker_id))
            if fields:
                found.append(WorkerInfo.read(fields))
            connection.broken.mended("worker", worker_id)
        except Exception as error:
            if not is_broken(error):
                raise
            connection.broken.add("worker", worker_id, error)
    return found
