"""The fleet's register of worker processes, for people to look at; nothing depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchllm_celery.connection import Connection
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
        )


async def list_workers(connection: Connection, keys: Keys) -> list[WorkerInfo]:
    """The processes seen within the last minute, the latest first."""
    client: Any = connection.client
    ids = await connection.patiently(lambda: client.zrevrange(keys.workers, 0, -1))
    entries = [await client.hgetall(keys.worker(worker_id.decode())) for worker_id in ids]
    return [WorkerInfo.read(fields) for fields in entries if fields]
