"""The progress of a batch: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from batchllm_celery.cli.display.wording import count, duration, money, rate, short
from batchllm_celery.models import BatchProgress

#: Seconds over which the rate is measured.
RATE_WINDOW_SECONDS = 30.0
#: Answers before which nobody can say how long the rest takes.
LEAST_ANSWERS = 10
#: Seconds between two lines of `PlainDisplay`.
PLAIN_INTERVAL_SECONDS = 5.0


class RateMeter:
    """Items a second over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self.counted = 0
        """Items that the last rate was measured with."""

    def update(self, finished: int) -> float:
        """Record how many items are finished now. Returns items per second."""
        now = self._clock()
        self._seen.append((now, finished))
        while now - self._seen[0][0] > RATE_WINDOW_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        self.counted = max(0, finished - before)
        return self.counted / (now - since) if now > since else 0.0


@dataclass(frozen=True, slots=True)
class View:
    """What a display shows at one moment."""

    progress: BatchProgress
    total: int | None = None
    """The number of all items, perhaps estimated; None if it is not known."""
    rate: float = 0.0
    doing: str = ""
    """What the batch waits for, in a few words."""
    estimated: bool = False
    """Whether `total` is an estimate: rows are still being read."""
    counted: int | None = None
    """Answers that the rate was measured with; None: it is taken as it is."""

    @property
    def eta(self) -> float | None:
        """Seconds left at this rate."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0, self.total - self.progress.finished) / self.rate


class Display:
    """Shows nothing, as for `--quiet`. The other displays override it."""

    def update(self, view: View) -> None:
        """Show a view."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Remove what is not to stay."""


def time_left(view: View) -> str:
    """`3 min 15 s left`; `3 min to 5 min 10 s left` while few answers have come; empty while it
    can't be known."""
    if view.eta is None or not view.progress.finished:
        return ""
    if view.counted is None or view.counted >= 400:
        return f"{duration(view.eta)} left"
    if view.counted < LEAST_ANSWERS:
        return ""
    # Answers come at random: of n the next half minute brings n give or take two roots of n.
    spread = 2 / math.sqrt(view.counted)
    fewest, most = view.eta / (1 + spread), view.eta / (1 - min(spread, 0.6))
    if duration(fewest) == duration(most):
        return f"{duration(fewest)} left"
    return f"{duration(fewest)} to {duration(most)} left"


def counters(view: View) -> str:
    """`✓ 1,200  ✗ 3  · 1.2M tokens · $0.0340`"""
    progress = view.progress
    tokens = progress.input_tokens + progress.output_tokens
    parts = [f"✓ {count(progress.succeeded)}  ✗ {count(progress.failed)}"]
    if progress.in_flight:
        parts.append(f"{count(progress.in_flight)} in flight")
    if tokens:
        parts.append(f"{short(tokens)} tokens")
    if progress.cost is not None:
        parts.append(money(progress.cost))
    return " · ".join(parts)


def headline(view: View) -> str:
    """`1,203/10,000  45.1/s  3 min 15 s left`"""
    total = "?" if view.total is None else count(view.total)
    if view.estimated and view.total is not None:
        total = f"about {total}"
    parts = [f"{count(view.progress.finished)}/{total}"]
    if view.rate > 0:
        parts.append(rate(view.rate))
    if left := time_left(view):
        parts.append(left)
    return "  ".join(parts)


class _Bar(Progress):
    """A bar with a second line below it."""

    below: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield self.below


class LiveDisplay(Display):
    """A bar and a line of counters that redraw themselves and disappear when closed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = _Bar(
            SpinnerColumn(),
            BarColumn(bar_width=min(40, max(10, console.width - 45))),
            TextColumn("{task.description}", markup=False),
            console=console, refresh_per_second=8, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("starting …", total=None)
        self._bar.start()

    def update(self, view: View) -> None:
        below = Text("  " + counters(view))
        if view.doing:
            below.append(f" · {view.doing}", style="yellow")
        self._bar.below = below
        self._bar.update(
            self._task,
            description=headline(view),
            completed=view.progress.finished,
            total=view.total,
        )

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._bar.stop()


class PlainDisplay(Display):
    """Prints a line every few seconds, for logs and pipes."""

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


def open_display(console: Console, *, quiet: bool) -> Display:
    """The display for this terminal, log or `--quiet`."""
    if quiet:
        return Display()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
