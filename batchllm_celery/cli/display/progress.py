"""How far a batch is: a live bar on a terminal, a plain line now and then elsewhere, or silence."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from batchllm_celery.cli.display.wording import count, duration, money, rate, short
from batchllm_celery.models import BatchProgress

RATE_WINDOW_SECONDS = 30.0
PLAIN_INTERVAL_SECONDS = 5.0


class RateMeter:
    """Items a second over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, finished: int) -> float:
        """Note the count; items per second."""
        now = self._clock()
        self._seen.append((now, finished))
        while now - self._seen[0][0] > RATE_WINDOW_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        return max(0.0, (finished - before) / (now - since)) if now > since else 0.0


@dataclass(frozen=True, slots=True)
class View:
    """What is shown at one moment."""

    progress: BatchProgress
    total: int | None = None
    """Items in all, perhaps an estimate; None while it can't be known."""
    rate: float = 0.0
    written: int = 0
    doing: str = ""
    """What it waits for, in a few words."""

    @property
    def eta(self) -> float | None:
        """Seconds to go at this rate."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0, self.total - self.progress.finished) / self.rate


class Display(Protocol):
    """Shows views."""

    def update(self, view: View) -> None: ...
    def say(self, text: str) -> None:
        """One line that stays."""

    def close(self) -> None: ...


def counters(view: View) -> str:
    """`✓ 1,200  ✗ 3  · 1.2M tokens · $0.0340`"""
    progress = view.progress
    tokens = progress.input_tokens + progress.output_tokens
    parts = [f"✓ {count(progress.succeeded)}  ✗ {count(progress.failed)}"]
    if progress.in_flight:
        parts.append(f"{count(progress.in_flight)} under way")
    if tokens:
        parts.append(f"{short(tokens)} tokens")
    if progress.cost is not None:
        parts.append(money(progress.cost))
    return " · ".join(parts)


def headline(view: View) -> str:
    """`1,203/10,000  45.1/s  3 min 15 s left`"""
    total = "?" if view.total is None else count(view.total)
    parts = [f"{count(view.progress.finished)}/{total}"]
    if view.rate > 0:
        parts.append(rate(view.rate))
    if view.eta is not None and view.progress.finished:
        parts.append(f"{duration(view.eta)} left")
    return "  ".join(parts)


class LiveDisplay:
    """A bar and a line of counters that redraw themselves; gone when closed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots")
        self._view: View | None = None
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=8, transient=True
        )
        self._live.start()

    def update(self, view: View) -> None:
        self._view = view

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        view = self._view
        if view is None:
            return Text("starting …", style="dim")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(
            total=view.total or 100,
            completed=view.progress.finished,
            pulse=view.total is None,
            width=min(40, max(10, self._console.width - 45)),
        )
        line.add_row(self._spinner, bar, headline(view))
        below = Text("  " + counters(view))
        if view.doing:
            below.append(f" · {view.doing}", style="yellow")
        return Group(line, below)


class PlainDisplay:
    """One line every few seconds, for logs and pipes."""

    def __init__(
        self,
        console: Console,
        *,
        interval: float = PLAIN_INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._next = clock() + interval

    def update(self, view: View) -> None:
        if self._clock() < self._next:
            return
        self._next = self._clock() + self._interval
        doing = f" · {view.doing}" if view.doing else ""
        self.say(f"{headline(view)}  {counters(view)}{doing}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Nothing to end."""


class QuietDisplay:
    """Nothing."""

    def update(self, view: View) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_display(console: Console, *, quiet: bool) -> Display:
    """The display for this terminal, log or `--quiet`."""
    if quiet:
        return QuietDisplay()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
