"""The progress callback: when it is called, and that it is in nobody's way."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time

import pytest
from rich.console import Console

from batchllm_celery.compat.progress import ProgressReporter, RichProgressBar


async def test_a_callback_hears_every_interval_and_the_end_in_order() -> None:
    """`(completed, total, current_item_id)`, off the event loop's thread."""
    calls: list[tuple[int, int, str]] = []
    threads: set[int] = set()

    def callback(completed: int, total: int, item_id: str) -> None:
        threads.add(threading.get_ident())
        calls.append((completed, total, item_id))

    reporter = ProgressReporter(callback, 10, 5)
    for done in range(1, 26):
        reporter.report(done, 25, f"item-{done}")
    await reporter.finish()
    assert calls == [(10, 25, "item-10"), (20, 25, "item-20"), (25, 25, "item-25")]
    assert threading.get_ident() not in threads


async def test_an_async_callback_runs_on_the_loop() -> None:
    """It may use what lives there."""
    seen: list[object] = []

    async def callback(completed: int, total: int, item_id: str) -> None:
        seen.append(asyncio.get_running_loop())

    reporter = ProgressReporter(callback, 1, 5)
    reporter.report(1, 1, "a")
    await reporter.finish()
    assert seen == [asyncio.get_running_loop()]


async def test_a_callback_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The next one is still made."""
    calls: list[int] = []

    def callback(completed: int, total: int, item_id: str) -> None:
        calls.append(completed)
        raise ZeroDivisionError

    reporter = ProgressReporter(callback, 1, 5)
    with caplog.at_level(logging.WARNING):
        reporter.report(1, 2, "a")
        reporter.report(2, 2, "b")
        await reporter.finish()
    assert calls == [1, 2]
    assert len(caplog.records) == 2


async def test_a_callback_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Reporting returns at once and the end waits one timeout at most."""
    release = threading.Event()

    def hangs(completed: int, total: int, item_id: str) -> None:
        release.wait(30)

    reporter = ProgressReporter(hangs, 1, 0.05)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        reporter.report(1, 1, "a")
        await reporter.finish()
    release.set()
    assert time.monotonic() - started < 5
    assert not reporter._progress_tasks


def test_the_rich_bar_draws_and_starts_over() -> None:
    """It shows the count, closes at the end, and serves a second run."""
    screen = io.StringIO()
    bar = RichProgressBar(console=Console(file=screen, force_terminal=True, width=100))
    bar(5, 10, "a")
    assert bar.completed == 5
    bar(10, 10, "b")
    assert "10/10" in screen.getvalue()
    assert bar.completed == 0
    bar(1, 3, "c")
    bar(3, 3, "d")
    assert "3/3" in screen.getvalue()
