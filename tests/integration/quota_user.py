"""A process that makes its own calls on the fleet's quota: half by `with`, half by `async with`.

python -m tests.integration.quota_user JOURNAL CALLS; each call is a line of the journal: the
system-wide monotonic clock, as the provider would see it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path

from batchllm_celery import quota


def note(journal: Path) -> None:
    with journal.open("a") as file:
        file.write(f"{time.monotonic()}\n")


def blocking(journal: Path, calls: int) -> None:
    for _ in range(calls):
        with quota("shared", tokens=100):
            note(journal)


async def awaiting(journal: Path, calls: int) -> None:
    async def call() -> None:
        async with quota("shared", tokens=100) as permit:
            note(journal)
            permit.used(input_tokens=80, output_tokens=20)

    await asyncio.gather(*(call() for _ in range(calls)))


if __name__ == "__main__":
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    thread = threading.Thread(target=blocking, args=(path, count // 2))
    thread.start()
    asyncio.run(awaiting(path, count - count // 2))
    thread.join()
