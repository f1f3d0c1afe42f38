"""An asyncio execution pool for Celery's own worker, for any Celery app.

    celery -A app worker -P custom -c 1000    with CELERY_CUSTOM_WORKER_POOL set to
    batchllm_celery.worker.pool:AsyncioPool   or worker_pool = the same in the app's settings

Celery's unmodified tracer runs on the process's event loop, each task in a greenlet of its own
(see `greenlet_bridge`). `async def` tasks just work; a synchronous task body awaits through
`event_loop.run`, and one that blocks, blocks them all (the watchdog names it).

Two threads share the work. Celery's own thread admits tasks and hears of their ends, so that
acknowledgements touch the broker's connection from there only. The loop's thread runs the tasks
and queues what there is to report; a descriptor in Celery's hub wakes the former, once for all
that ends in the same turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, signals
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.exceptions import ImproperlyConfigured, WorkerLostError
from celery.utils import threads as celery_threads
from celery.worker import state as worker_state

from batchllm_celery import event_loop
from batchllm_celery.worker.pool.greenlet_bridge import BridgedCall, run_in_greenlet
from batchllm_celery.worker.pool.transport import gather_acknowledgements, send_acknowledgements
from batchllm_celery.worker.pool.watchdog import Watchdog

logger = logging.getLogger("batchllm_celery")

#: How long cancelled tasks may clean up in a cold shutdown, in seconds.
COLD_SHUTDOWN_SECONDS = 2.5

#: How long one of the two threads runs before the other may, in seconds. Python's own 5 ms would
#: make Celery's thread wait so long after each of its round trips to the broker.
SWITCH_SECONDS = 0.0005

#: Celery's thread is woken for what has ended this often at most: it acknowledges in batches.
WAKE_SECONDS = 0.01

_AUTOSCALE = (
    "AsyncioPool does not autoscale: an idle slot costs nothing, so set --concurrency to the most "
    "tasks that may run at once and leave --autoscale out (pool_grow and pool_shrink work)"
)
_FAST_LOCALS = (
    "AsyncioPool can't work under USE_FAST_LOCALS: interleaved tasks would see each other's "
    "self.request; unset it"
)


class Job:
    """One task that Celery handed to the pool.

    Celery's request keeps a weak reference to it, as its result in the pool, to terminate it.
    """

    __slots__ = (
        "__weakref__",
        "_arguments",
        "_callbacks",
        "_options",
        "_outcome",
        "_pool",
        "_target",
        "_timers",
        "call",
        "killed",
    )

    def __init__(
        self,
        pool: AsyncioPool,
        target: Callable[..., Any],
        arguments: tuple[Sequence[Any], Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        self.call = BridgedCall(self._run, self._end)
        self.killed = False
        self._pool = pool
        self._target = target
        self._arguments = arguments
        self._options = options
        self._outcome: Any = None
        self._timers: list[asyncio.TimerHandle] = []

    # -- Celery's thread

    def accept(self) -> None:
        """Tell Celery that the task begins: this acknowledges it early and sends `task-started`."""
        if accept := self._options.get("accept_callback"):
            accept(os.getpid(), time.monotonic())

    def terminate(self, signal: object = None) -> None:
        """Cancel the coroutine; Celery, which asks for it, reports the task itself."""
        self._pool.on_loop(self.call.cancel)

    def report(self) -> None:
        """Tell Celery how the task ended, unless it knows because it was its doing."""
        if self.call.cancelled or self.killed:
            return
        failed = isinstance(self._outcome, ExceptionInfo)
        if tell := self._options.get("error_callback" if failed else "callback"):
            tell(self._outcome)

    def report_timeout(self, soft: bool, seconds: float) -> None:
        """Tell Celery that a time limit was reached."""
        if tell := self._options.get("timeout_callback"):
            tell(soft, seconds)

    # -- the loop's thread

    def start(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        """Begin, and start the clocks of the time limits."""
        self.call.start(loop, context)
        limits = ((self._soft_limit, "soft_timeout"), (self._hard_limit, "timeout"))
        for limit, name in limits:
            if seconds := self._options.get(name):
                self._timers.append(loop.call_later(seconds, limit, seconds))

    def _run(self) -> None:
        args, kwargs = self._arguments
        try:
            self._outcome = self._target(*args, **kwargs)
        except BaseException as error:
            # Only what Celery's tracer doesn't turn into an outcome arrives here.
            self._outcome = None if self.call.cancelled else _failure(error)

    def _end(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()  # they refer to this job
        self._pool.on_end(self)

    def _soft_limit(self, seconds: float) -> None:
        self._pool.tell(functools.partial(self.report_timeout, True, seconds))
        self.call.limit(seconds)

    def _hard_limit(self, seconds: float) -> None:
        self.killed = True
        self._pool.tell(functools.partial(self.report_timeout, False, seconds))
        self.call.cancel()


def _failure(error: BaseException) -> ExceptionInfo:
    """What Celery is told of an exception that left its tracer."""
    if isinstance(error, Exception | SystemExit | KeyboardInterrupt):
        return ExceptionInfo()
    try:
        raise WorkerLostError(repr(error)) from error
    except WorkerLostError:
        return ExceptionInfo()


class _Waker:
    """A descriptor that becomes readable when another thread calls `wake`.

    Kept open till the process ends: an abandoned task may still call `wake`.
    """

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.reader = self._writer = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self.reader, self._writer = os.pipe()
            os.set_blocking(self.reader, False)
            os.set_blocking(self._writer, False)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._writer, (1).to_bytes(8, "little"))

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, 4096)

    def wait(self, seconds: float) -> None:
        select.select([self.reader], [], [], seconds)


class AsyncioPool(BasePool):
    """Runs up to `limit` (`--concurrency`, thousands if you like) tasks in one process."""

    body_can_be_buffer = True
    signal_safe = False

    limit: int
    app: Celery | None

    admit: Callable[[int], int] | None = None
    """In place of `limit`: how many more messages may be taken, given how many are in hand.
    Celery asks before each, under `worker_disable_prefetch`; `look_again` makes it ask anew."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if getattr(celery_threads, "USE_FAST_LOCALS", None):
            raise ImproperlyConfigured(_FAST_LOCALS)
        # With no hub (a broker that is not asynchronous), reports go out on the loop's thread.
        self._has_hub = not self.options.get("threads", True)
        self._hub: Any = None
        self._lock = threading.RLock()  # re-entrant: a cold shutdown runs in a signal handler
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._to_loop: deque[Callable[[], object]] = deque()
        self._to_celery: deque[Callable[[], object]] = deque()
        self._loop_is_awake = self._celery_is_awake = False
        self._finished = self._wake_ups = 0
        self._next_wake = 0.0
        self._stepped: list[tuple[Any, str, Any]] = []

    # -- life

    def on_start(self) -> None:
        """Start the loop, its watchdog, and let `async def` tasks be awaited."""
        self._waker = _Waker()
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_seconds))
        self._loop = event_loop.loop()
        self._context = contextvars.copy_context()
        self._watchdog = Watchdog(self._loop)
        self._watchdog.start()
        event_loop.use_bridge(run_in_greenlet)
        if self.app is not None:
            self._step_coroutines(self.app)

    def register_with_event_loop(self, hub: Any) -> None:
        """Let Celery's hub listen for finished tasks; called again after each reconnect."""
        self._hub = hub
        hub.add_reader(self._waker.reader, self._deliver)
        # Celery acknowledges in the hub's turn after our report, and before that turn's ticks.
        hub.on_tick.add(send_acknowledgements)

    def flush(self) -> None:
        """Forget tasks that have not begun: the broker, which was lost, delivers them again."""
        self._waiting.clear()

    def on_stop(self) -> None:
        """Wait for the tasks under way: till the end, or briefly if the shutdown is a cold one.

        Those that have not begun are not acknowledged and go back to the broker.
        """
        self._waiting.clear()
        self._wait_for_jobs()
        self._close()

    def on_terminate(self) -> None:
        """Cancel everything and wait briefly."""
        self._waiting.clear()
        self._wait_for_jobs(cold=True)
        self._close()

    def _close(self) -> None:
        event_loop.use_bridge(None)
        self._watchdog.stop()
        sys.setswitchinterval(self._switch_seconds)
        for task, name, function in self._stepped:
            setattr(task, name, function)
        self._stepped.clear()
        if self._hub is not None:
            hub, self._hub = self._hub, None
            hub.remove_reader(self._waker.reader)
            hub.on_tick.discard(send_acknowledgements)
        send_acknowledgements()

    # -- Celery's thread

    def on_apply(  # type: ignore[override]  # celery-types says None; all of Celery's pools return
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job:
        """Run `target` (Celery's tracer) as soon as there is a slot."""
        for name in ("soft_timeout", "timeout"):
            options[name] = options.get(name) or self.options.get(name)
        job = Job(self, target, (args, kwargs or {}), options)
        self._waiting.append(job)
        self._admit()
        return job

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """Celery terminates the `Job` right after this, by its own reference to it.

        What has ended meanwhile is reported first: a soft shutdown must acknowledge, not cancel it.
        """
        if self._has_hub:
            self._deliver()

    def grow(self, n: int = 1) -> None:
        """Let `n` more tasks run at once."""
        self.limit += n
        self._admit()

    @property
    def num_processes(self) -> int:
        """What Celery compares the messages in hand with before it takes another."""
        if self.admit is None:
            return self.limit
        return sys.maxsize if self.room > 0 else 0

    @property
    def room(self) -> int:
        """How many more messages may be taken now."""
        in_hand = len(self._running) + len(self._waiting)
        return self.limit - in_hand if self.admit is None else self.admit(in_hand)

    def shrink(self, n: int = 1) -> None:
        """Let `n` fewer tasks run at once, at least one; nothing that runs is stopped."""
        if n >= self.limit:
            raise ValueError(f"the pool has {self.limit} slots: it can't shrink by {n}")
        self.limit -= n

    def _admit(self) -> None:
        while job := self._next():
            self._safely(job.accept)
            self.on_loop(functools.partial(self._begin, job))

    def _next(self) -> Job | None:
        with self._lock:
            if not self._waiting or (self.admit is None and len(self._running) >= self.limit):
                return None
            job = self._waiting.popleft()
            self._running.add(job)
            return job

    def _deliver(self) -> None:
        """Report what the loop's thread has queued, then fill the slots that became free."""
        self._waker.drain()
        self._celery_is_awake = False
        gather_acknowledgements()
        while self._to_celery:
            self._safely(self._to_celery.popleft())
        if self._hub is None:
            send_acknowledgements()
        self._admit()

    def _settle(self, job: Job) -> None:
        self._running.discard(job)
        self._finished += 1
        job.report()

    def _safely(self, report: Callable[[], object]) -> None:
        try:
            report()
        except Exception:
            logger.exception("pool.report_failed")

    def _wait_for_jobs(self, cold: bool = False) -> None:
        deadline: float | None = None
        if self._hub is not None:
            # Between a lost broker and the next one the hub has forgotten us.
            self._hub.add_reader(self._waker.reader, self._deliver)
        while self._running:
            if cold or _is_cold_shutdown():
                if deadline is None:
                    deadline = time.monotonic() + COLD_SHUTDOWN_SECONDS
                    self._cancel_all()
                if time.monotonic() > deadline:
                    logger.warning("pool.abandoned tasks=%d", len(self._running))
                    self._running.clear()
                    return
                self._turn()
            else:
                self._turn_hub()
        if not cold and self._hub is not None:
            self._waker.wake()  # Celery acknowledges in the turn after the last report
            self._turn_hub()

    def _cancel_all(self) -> None:
        for job in list(self._running):
            job.terminate()

    def _turn(self) -> None:
        self._waker.wait(0.1)
        self._deliver()

    def _turn_hub(self) -> None:
        """Keep Celery's hub turning while tasks finish: it acknowledges, beats, takes commands."""
        if self._hub is None:
            return self._turn()
        try:
            self._hub.run_once()
        except Exception as error:
            logger.warning("pool.hub_lost error=%s", type(error).__name__)
            self._hub = None
        return None

    # -- between the threads

    def on_loop(self, call: Callable[[], object]) -> None:
        """Call on the loop's thread, soon; one wake-up for all that gather meanwhile."""
        self._to_loop.append(call)
        if not self._loop_is_awake:
            self._loop_is_awake = True
            self._loop.call_soon_threadsafe(self._on_loop_awake)

    def tell(self, report: Callable[[], object]) -> None:
        """From the loop's thread: call on Celery's; one wake-up for a turn of the loop."""
        self._to_celery.append(report)
        if not self._celery_is_awake:
            self._celery_is_awake = True
            self._wake_ups += 1
            wake = self._waker.wake if self._has_hub else self._deliver
            now = self._loop.time()
            self._next_wake = max(now, self._next_wake + WAKE_SECONDS)
            self._loop.call_at(self._next_wake, wake)

    def look_again(self) -> None:
        """From the loop's thread: `admit` may answer otherwise now, so let Celery ask it."""
        self.tell(_nothing)

    # -- the loop's thread

    def _on_loop_awake(self) -> None:
        self._loop_is_awake = False
        while self._to_loop:
            self._to_loop.popleft()()

    def _begin(self, job: Job) -> None:
        job.start(self._loop, self._context.copy())

    def on_end(self, job: Job) -> None:
        """Have a job's end reported, and its slot freed."""
        self.tell(functools.partial(self._settle, job))

    # -- async def tasks

    def _step_coroutines(self, app: Celery) -> None:
        """Let the tracers, built after this, await `async def` tasks.

        Set on the task objects: Celery's tracer calls `task.run`, or through autoretry's wrapper
        `task._orig_run`.
        """
        for task in app.tasks.values():
            name = "_orig_run" if hasattr(task, "_orig_run") else "run"
            function = getattr(task, name)
            if inspect.iscoroutinefunction(inspect.unwrap(function)):
                self._stepped.append((task, name, function))
                setattr(task, name, _awaited(task, function))

    # -- inspect

    def _get_info(self) -> dict[str, Any]:
        """What `inspect stats` shows of the pool."""
        return {
            "implementation": f"{type(self).__module__}:{type(self).__qualname__}",
            "max-concurrency": self.limit,
            "processes": [os.getpid()],
            "loop": type(self._loop).__module__,
            "running": len(self._running),
            "waiting": len(self._waiting),
            "finished": self._finished,
            "hub-wake-ups": self._wake_ups,
            "loop-blocked": self._watchdog.blocked,
        }


def _awaited(task: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a tracer. Called directly, by other code, it stays a coroutine function."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result) and not task.request.called_directly:
            return event_loop.run(result)
        return result

    return run


def _nothing() -> None:
    """Only wakes Celery's thread."""


def _is_cold_shutdown() -> bool:
    flag = worker_state.should_terminate
    return flag is not None and flag is not False


@signals.worker_init.connect(weak=False)
def _refuse_autoscale(sender: Any, **_: Any) -> None:
    """Refuse --autoscale, of which a pool itself learns nothing.

    Celery logs and swallows what a receiver raises, but for SystemExit.
    """
    if sender.options.get("autoscale") and get_implementation(sender.pool_cls) is AsyncioPool:
        raise SystemExit(_AUTOSCALE)
