"""Who feeds a batch and who takes its results: leased, renewed, refused with a clear word."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from batchllm_celery.connection import Script
from batchllm_celery.errors import BatchConflictError, BatchNotFoundError
from batchllm_celery.ledger import scripts

Run = Callable[[Script, str, Sequence[str | int]], Awaitable[Any]]

POLL = 0.25


class Lock:
    """An async context manager. Several of one process may hold the same lock.

    Args:
        run: runs a script of the batch, patiently.
        role: `consumer` or `producer`.
        owner: the process's id.
        lease: seconds after which a dead holder is replaced (one that died on this host: at once).
        wait: seconds to wait for another holder before the refusal.

    Raises:
        BatchConflictError: on entry, when somebody else holds it.
    """

    def __init__(
        self, run: Run, batch_id: str, role: str, owner: str, lease: float, wait: float
    ) -> None:
        self._run = run
        self._batch_id = batch_id
        self._role = role
        self._owner = owner
        self._lease = lease
        self._wait = wait
        self._renewing: asyncio.Task[None] | None = None
        self.lost = False
        """Whether somebody else has taken it (this process was silent for a lease)."""

    async def __aenter__(self) -> Self:
        await self._take()
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        try:
            await self._ask("release")
        except BatchNotFoundError:
            return

    async def _take(self) -> None:
        give_up = time.monotonic() + self._wait
        dead = ""
        while True:
            mine, holder, left = await self._ask("take", dead)
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
            await asyncio.sleep(POLL)

    async def _renew(self) -> None:
        while not self.lost:
            await asyncio.sleep(self._lease / 3)
            mine, _, _ = await self._ask("renew")
            self.lost = not mine

    async def _ask(self, action: str, dead: str = "") -> Any:
        milliseconds = round(self._lease * 1000)
        arguments: list[str | int] = [action, self._role, self._owner, milliseconds, dead]
        return await self._run(scripts.LOCK, self._batch_id, arguments)


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
