"""Who feeds a batch and who takes its results: a leased lock, and the ids of processes."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from batchllm_celery.errors import BatchConflictError, BatchNotFoundError
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.scripts import Argument, ScriptRunner

#: Seconds between two tries to take a lock that somebody else holds.
RETRY_SECONDS = 0.25


class BatchLock:
    """An async context manager. Several of one process may hold the same lock.

    Args:
        runner: runs the batch's scripts; its process is the owner.
        batch_id: the batch.
        role: `consumer` or `producer`.
        lease: seconds after which a dead holder is replaced (one that died on this host: at once).
        wait: seconds to wait for another holder before the refusal.

    Raises:
        BatchConflictError: on entry, when somebody else holds it.
    """

    def __init__(
        self, runner: ScriptRunner, batch_id: str, role: str, lease: float, wait: float
    ) -> None:
        self._runner = runner
        self._batch_id = batch_id
        self._role = role
        self._lease = lease
        self._wait = wait
        self._renewing: asyncio.Task[None] | None = None
        self.lost = False
        """Whether somebody else has taken it (this process did not renew it for a lease)."""

    async def __aenter__(self) -> Self:
        await self._take()
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        try:
            await self._call("release")
        except BatchNotFoundError:
            return

    async def _take(self) -> None:
        give_up = time.monotonic() + self._wait
        dead = ""
        while True:
            mine, holder, left = await self._call("take", dead)
            if mine:
                return
            holder = holder.decode()
            if dead != holder and died_here(holder):
                dead = holder
                continue
            if time.monotonic() >= give_up:
                raise BatchConflictError(
                    f"batch {self._batch_id!r} has a {self._role} already ({holder}); "
                    f"if that one is dead, try again in {left / 1000:.0f} s"
                )
            await asyncio.sleep(RETRY_SECONDS)

    async def _renew(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._lease / 3)
            mine, _, _ = await self._call("renew")
            self.lost = not mine

    async def _call(self, action: str, dead: str = "") -> Any:
        milliseconds = round(self._lease * 1000)
        owner = self._runner.process_id
        arguments: list[Argument] = [action, self._role, owner, milliseconds, dead]
        return await self._runner.run(scripts.LOCK, self._batch_id, arguments)


def new_process_id() -> str:
    """`host.place:pid:random`: unique, and tells others on this host whether it still lives."""
    return f"{_here()}:{os.getpid()}:{secrets.token_hex(4)}"


@lru_cache(maxsize=1)
def _here() -> str:
    """This host, in a word that no other machine, boot or container shares.

    Host names do repeat (`localhost`, fixed names of containers), and a process id of another
    machine must never be looked up on this one.
    """
    host = socket.gethostname().replace(":", "_").replace(" ", "_")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:12]
        pids = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux: a place of our own, so that nobody is judged by its pid
        return f"{host}.{secrets.token_hex(8)}"
    return f"{host}.{boot}{pids:x}"


def died_here(process_id: str) -> bool:
    """Whether `process_id` (see `new_process_id`) was on this host and is no more."""
    place, _, rest = process_id.partition(":")
    pid = rest.partition(":")[0]
    if place != _here() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
