"""The heartbeat of a worker process, from a thread of its own.

User code that blocks the event loop must not cost the process everything that it holds, so the
beat has its own thread and its own Redis client. The loop only gets the replies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from batchllm_celery.connection import BrokenEntries, Script, client_url, is_broken
from batchllm_celery.connection.scripts import refuses_first_line
from batchllm_celery.errors import describe
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.scripts import key_list, text
from batchllm_celery.ledger.workers import WorkerInfo
from batchllm_celery.models import BatchState

logger = logging.getLogger("batchllm_celery")

TIMEOUT = 5.0
#: Seconds between two descriptions of the process in the register.
PRESENCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Beat:
    """One batch's reply. `state` None: Redis does not know the batch any more. `lost`: this
    process had been given up (or is new to the batch) and should reclaim its items."""

    batch_id: str
    state: BatchState | None
    lost: bool


class Heartbeat:
    """Renews, every `interval` seconds and at once when somebody steers a batch, everything that
    a process holds.

    Args:
        url: of Redis.
        keys: the fleet's names.
        process_id: the ledger's.
        batches: ids of the batches held now, called in the thread: `ledger.claims.holding.batches`.
        notify: gets all replies of a beat, in the thread: pass them to the loop by
            `call_soon_threadsafe`, and there to `ledger.recovery.on_heartbeat`.
        interval: seconds.
        presence: describes the process for `status`; None for no entry in the register.
        able: the Redis commands that say, at a server time, what the process can run.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        process_id: str,
        batches: Callable[[], list[str]],
        notify: Callable[[list[Beat]], object],
        interval: float = 1.0,
        presence: Callable[[], WorkerInfo] | None = None,
        able: Callable[[float], Sequence[Sequence[Any]]] = lambda moment: (),
    ) -> None:
        self._url = url
        self._keys = keys
        self._process_id = process_id
        self._batches = batches
        self._notify = notify
        self._interval = interval
        self._presence = presence
        self._able = able
        self._broken = BrokenEntries()
        self._present_at = float("-inf")
        self._script = scripts.BEAT
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.last_beat = time.monotonic()
        """Monotonic time of the last beat that Redis answered (for probes)."""

    def start(self) -> None:
        """Start the thread; only after a fork, never before."""
        self._thread = threading.Thread(
            target=self._beat_on, name="batchllm-heartbeat", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what the process still holds then expires after a lease. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=TIMEOUT + 2 * self._interval)
            self._thread = None

    def _beat_on(self) -> None:
        while not self._stopping.is_set():
            client = self._connect()
            try:
                self._beat_with(client)
            except (redis.RedisError, OSError) as error:
                # The loop's own client logs that Redis is away.
                logger.debug("heartbeat.failed error=%s", describe(error))
                self._stopping.wait(min(self._interval, 0.5))
            except Exception:
                logger.exception("heartbeat.error")
                self._stopping.wait(self._interval)
            finally:
                client.close()

    def _connect(self) -> redis.Redis:
        return redis.Redis.from_url(
            client_url(self._url),
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )

    def _beat_with(self, client: redis.Redis) -> None:
        with client.pubsub(ignore_subscribe_messages=True) as news:
            news.subscribe(self._keys.control)
            while not self._stopping.is_set():
                started = time.monotonic()
                self._beat(client)
                self._wait(news, started + self._interval)
            if self._presence is not None:
                _pipeline(client, self._presence().farewell(self._keys))

    def _wait(self, news: Any, until: float) -> None:
        """Until the next beat is due, or somebody has steered a batch."""
        while not self._stopping.is_set() and (left := until - time.monotonic()) > 0:
            if news.get_message(timeout=min(left, 0.2)) is not None:
                return

    def _beat(self, client: redis.Redis) -> None:
        batches = self._batches()
        answers = self._run_for(client, batches)
        if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
            self._script = _loaded(client)
            answers = self._run_for(client, batches)
        self.last_beat = time.monotonic()
        if batches:
            beats = [self._beat_of(*pair) for pair in zip(batches, answers, strict=True)]
            self._notify([beat for beat in beats if beat is not None])
        self._show(client)

    def _run_for(self, client: redis.Redis, batches: Sequence[str]) -> list[Any]:
        commands: list[Sequence[Any]] = []
        for batch_id in batches:
            keys = key_list(self._keys, batch_id)
            commands.append(("EVALSHA", self._script.sha, len(keys), *keys, self._process_id))
        return _pipeline(client, commands)

    def _beat_of(self, batch_id: str, answer: Any) -> Beat | None:
        """None for a batch that is broken: the others must not lose their beat for it."""
        if isinstance(answer, Exception):
            if not is_broken(answer):
                raise answer
            self._broken.add("batch", batch_id, answer)
            return None
        if answer is None:
            return Beat(batch_id, None, False)
        return Beat(batch_id, BatchState(text(answer[0])), bool(answer[1]))

    def _show(self, client: redis.Redis) -> None:
        now = time.monotonic()
        if self._presence is not None and now - self._present_at >= PRESENCE_SECONDS:
            self._present_at = now
            seconds, microseconds = client.time()
            moment = seconds + microseconds / 1e6
            shown = self._presence().commands(self._keys, moment)
            _pipeline(client, [*shown, *self._able(moment)])


def _loaded(client: redis.Redis) -> Script:
    """The script in the form that this server takes."""
    script = scripts.BEAT
    try:
        client.script_load(script.text)
    except redis.ResponseError as error:
        if script.before_7 is None or not refuses_first_line(error):
            raise
        script = script.before_7
        client.script_load(script.text)
    return script


def _pipeline(client: redis.Redis, commands: Sequence[Sequence[Any]]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        return list(pipeline.execute(raise_on_error=False))
