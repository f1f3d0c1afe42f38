"""The watchdog that names code which blocks the loop."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from batchllm_celery.events import Event, LoopBlocked
from batchllm_celery.worker.pool import watchdog
from tests.support import wait_until_async


def _block_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_code_that_blocks_is_logged_and_told_with_its_stack(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One block makes one LoopBlocked event and one warning that show where the loop stands."""
    told: list[Event] = []
    monkeypatch.setattr(watchdog, "events", type(watchdog.events)(told.append))
    dog = watchdog.Watchdog(asyncio.get_running_loop(), threshold=0.1)
    dog.start()
    try:
        with caplog.at_level(logging.WARNING, logger="batchllm_celery"):
            await wait_until_async(lambda: dog.watching)
            _block_the_loop(0.5)
            await wait_until_async(lambda: told)
            await asyncio.sleep(0.2)
    finally:
        dog.stop()
    assert dog.blocked == len(told) == 1
    blocked = told[0]
    assert isinstance(blocked, LoopBlocked)
    assert blocked.seconds >= 0.1
    assert "_block_the_loop" in blocked.stack
    assert "loop.blocked" in caplog.text


async def test_a_loop_that_runs_is_left_alone() -> None:
    """A busy loop that keeps turning is not reported."""
    dog = watchdog.Watchdog(asyncio.get_running_loop(), threshold=0.2)
    dog.start()
    try:
        for _ in range(60):
            await asyncio.sleep(0.01)
    finally:
        dog.stop()
    assert dog.blocked == 0
